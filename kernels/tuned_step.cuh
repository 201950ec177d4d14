// Stage tuned: a training step in two phases, with a barrier of the whole grid after each. In the first every block takes
// its images through the network alone, forward and back, with the weights in its shared memory, and leaves what the
// gradient needs: dense layers' sources and deltas (a trace an image), and its own sum of the convolutions' gradient. In
// the second every block sums the gradient of its share of the weights over the batch, in a fixed order, and updates them.
// Up to the first dense layer each team of a block takes one image at a time, so that one computes while another waits;
// from there on the block takes IMAGES together.
// Needs namespace network (generated): the layers' calls and the places of their arrays; BLOCK (threads) and TEAM
// (threads of a team).
#include "async.cuh"
#include "grid.cuh"
#include "layers.cuh"

static_assert(network::SHARED_QUADS > 0, "a block needs shared memory");

enum Mode { TRAIN, ONLY_FORWARD, GIVEN_ERRORS };

// What both phases of a step work on.
struct Step {
  const unsigned char* images;  // (N, IMAGE_SIZE)
  const unsigned char* labels;  // (N,)
  const int* order;             // (count,): which of them make the batch
  float* parameters;
  float* traces;    // (count, TRACE)
  float* partials;  // (groups, CONVOLVED): sums of the convolutions' gradient, a block's each
  float* outputs;   // (count, CLASSES): logits or, where errors are given, those
  float* losses;    // (count,), added to
  float* stash;     // (grid, IMAGES, KEPT): what backward will ask for, while a block takes other images forward
  float mean, deviation;
  int count;
};

// Where the time of a block goes: nowhere, unless somebody watches.
struct Unwatched {
  __device__ __forceinline__ void mark(int) {}
};

// The first block's first thread adds the time since its last mark to `spent[section]`.
struct Watched {
  unsigned long long* spent;
  unsigned long long last;

  __device__ __forceinline__ void mark(int section) {
    if (blockIdx.x || threadIdx.x) return;
    const unsigned long long now = ticks();
    if (section >= 0) spent[section] += now - last;
    last = now;
  }
};

// Blocks that have images: block b takes images b, b + grid, ...
__device__ __forceinline__ int groups_of(int count) { return min(static_cast<int>(gridDim.x), count); }

// *at += value, where nobody else adds meanwhile; the thread does not wait for it.
__device__ __forceinline__ void red_add(float* at, float value) {
#ifdef __CUDACC__
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(at), "f"(value) : "memory");
#else
  *at += value;
#endif
}

// How many lanes have numbers of their own where there are so many: a power of two, at most a warp.
__host__ __device__ constexpr int lanes_for(int numbers) {
  int lanes = 1;
  while (lanes < numbers && lanes < 32) lanes *= 2;
  return lanes;
}

// errors = derivative of the batch's mean loss by the logits, share = 1 / images of the batch; one warp. The loss of the
// image is added to *loss.
__device__ __forceinline__ void lose(const float* logits, int label, float share, float* errors, float* loss) {
  constexpr unsigned ALL = 0xffffffffu;
  constexpr int LANES = lanes_for(network::CLASSES);
  const int lane = threadIdx.x % LANES;  // the others do the same once more
  float largest = -INFINITY;
  for (int k = lane; k < network::CLASSES; k += LANES) largest = fmaxf(largest, logits[k]);
  for (int bit = LANES / 2; bit; bit /= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, bit));
  float sum = 0.0f, last = 0.0f;
  for (int k = lane; k < network::CLASSES; k += LANES) sum += last = expf(logits[k] - largest);
  for (int bit = LANES / 2; bit; bit /= 2) sum += __shfl_xor_sync(ALL, sum, bit);
  const float part = share / sum;
  for (int k = lane; k < network::CLASSES; k += LANES) {
    const float own = network::CLASSES <= LANES ? last : expf(logits[k] - largest);
    errors[k] = k == label ? own * part - share : own * part;
  }
  if (threadIdx.x % 32 == 0) red_add(loss, logf(sum) + largest - logits[label]);
}

// A team's next image on its way from device memory, each thread's share of the bytes in its registers.
struct Upcoming {
  static constexpr int PIXELS = (network::IMAGE_SIZE + TEAM - 1) / TEAM;
  unsigned char byte[PIXELS];
  int label;
  // The image after it: already its place in the data set, so that fetching it waits for nothing. -1: there is none.
  int next, image, steps;
  const int* order;

  // Images of `steps` steps, whose orders follow each other.
  __device__ __forceinline__ void begin(const Step& step, int steps_to_come) {
    order = step.order, image = first_image(), steps = image < step.count ? steps_to_come : 0;
    find();
    fetch(step);
  }
  // A block has images b, b + grid, ...; its teams take them by turns.
  static __device__ __forceinline__ int first_image() { return blockIdx.x + team() * gridDim.x; }
  __device__ __forceinline__ void find() { next = steps > 0 ? order[image] : -1; }

  __device__ __forceinline__ void fetch(const Step& step) {
    if (next < 0) return;
    const unsigned char* bytes = step.images + static_cast<long long>(next) * network::IMAGE_SIZE;
UNROLL
    for (int n = 0; n < PIXELS; n++)
      if (thread_rank() + n * TEAM < network::IMAGE_SIZE) byte[n] = bytes[thread_rank() + n * TEAM];
    label = step.labels[next];
    image += TEAMS * gridDim.x;
    if (image >= step.count) image = first_image(), order += step.count, steps--;
    find();
  }

  // image: normalised floats or, for a first layer that takes BYTES, words of a pixel and the one behind it
  // If there is none, an empty one, so that every team does the same; its errors will be 0.
  __device__ __forceinline__ void arrive(const Step& step, bool any, float* there, int* label_there) const {
UNROLL
    for (int n = 0; n < PIXELS; n++) {
      const int i = thread_rank() + n * TEAM;
      if (i >= network::IMAGE_SIZE) break;
      const int pixel = any ? byte[n] : 0;
      if (network::BYTES) {
        unsigned short* halves = reinterpret_cast<unsigned short*>(there);
        halves[2 * i] = to_bf16(pixel);
        halves[i ? 2 * i - 1 : 2 * network::IMAGE_SIZE - 1] = i ? to_bf16(pixel) : 0;
      } else {
        there[i] = (float(pixel) - step.mean) / step.deviation;
      }
    }
    if (thread_rank() == 0) *label_there = any ? label : 0;
  }
};

// What a block has from one step to the next.
struct Block {
  Upcoming upcoming;
  BulkCopyBarrier arrivals;  // of the dense layers' weights

  // All threads, when a launch begins.
  __device__ __forceinline__ Block(const Step& step, float* shared, int steps) {
    arrivals = {reinterpret_cast<unsigned long long*>(shared + network::ARRIVALS), 0, false};
    if (threadIdx.x == 0) init_bulk_copies(arrivals.arrived);
    network::prepare(shared);
    upcoming.begin(step, steps);
    __syncthreads();
  }
};

// All threads of a team: what is kept of an image, to and from device memory.
__device__ __forceinline__ void put_away(const float* kept, float* stash) {
  for (int i = thread_rank(); i < network::KEPT / 4; i += TEAM)
    reinterpret_cast<Float4*>(stash)[i] = reinterpret_cast<const Float4*>(kept)[i];
}
__device__ __forceinline__ void take_out(const float* stash, float* kept) {
  for (int i = thread_rank(); i < network::KEPT / 4; i += TEAM)
    copy_async(reinterpret_cast<Float4*>(kept) + i, reinterpret_cast<const Float4*>(stash) + i);
}

// block.upcoming is the team's first image, if it has any, and in the end its first of the next step.
template <class Watch>
__device__ __forceinline__ void take_images(const Step& step, int mode, float* shared, Block& block, Watch watch) {
  constexpr int IMAGES = network::IMAGES;
  const int grid = gridDim.x;
  if (static_cast<int>(blockIdx.x) >= step.count) return;
  watch.mark(-1);
  const float share = 1.0f / float(step.count);
  network::Sums sums;
  network::clear(sums);
  network::hold(step.parameters, shared, step.mean, step.deviation, block.arrivals);
  int* labels = reinterpret_cast<int*>(shared + network::LABELS);
  // a team's images lie in two places by turns, so that one comes or goes while the other is worked on
  // what is kept of an image lies first of all, by turns
  const auto kept = [&](int i) { return shared + i % network::PLACES * network::KEPT; };
  float* stash = step.stash + static_cast<long long>(blockIdx.x) * IMAGES * network::KEPT;
  for (int first = blockIdx.x; first < step.count; first += grid * IMAGES) {
    const int here = min(IMAGES, (step.count - first + grid - 1) / grid);
    const int rounds = (here + TEAMS - 1) / TEAMS;
    for (int round = 0; round < rounds; round++) {
      const int i = round * TEAMS + team();
      block.upcoming.arrive(step, i < here, network::image_of(shared, i), labels + i);
      if (i < here) block.upcoming.fetch(step);
      team_barrier();
      watch.mark(network::INPUT);
      network::forward_one(shared, i, step.deviation, watch);
      // the last ones stay where they are
      if (i + network::PLACES < rounds * TEAMS && mode != ONLY_FORWARD) put_away(kept(i), stash + i * network::KEPT);
    }
    network::forward_all(step.parameters, shared, block.arrivals, watch);
    for (int i = threadIdx.x / 32; i < here; i += BLOCK / 32) {
      const int image = first + i * grid, lane = threadIdx.x % 32;
      const float* logits = shared + network::LOGITS + i * network::CLASS_PITCH;
      float* errors = shared + network::ERRORS + i * network::CLASS_PITCH;
      float* outputs = step.outputs + image * network::CLASSES;
      if (mode == ONLY_FORWARD)
        for (int k = lane; k < network::CLASSES; k += 32) outputs[k] = logits[k];
      else if (mode == GIVEN_ERRORS)
        for (int k = lane; k < network::CLASSES; k += 32) errors[k] = outputs[k];
      else
        lose(logits, labels[i], share, errors, step.losses + image);
    }
    __syncthreads();
    watch.mark(network::LOSS);
    if (mode == ONLY_FORWARD) continue;
    network::backward_all(step.parameters, shared, step.traces + static_cast<long long>(first) * network::TRACE,
                          grid * network::TRACE, here, watch);
    for (int round = rounds - 1; round >= 0; round--) {
      const int i = round * TEAMS + team();
      if (i + network::PLACES < rounds * TEAMS) {
        wait_for_groups<1>();
        team_barrier();
        watch.mark(network::INPUT);
      }
      network::backward_one(shared, sums, i, watch);
      if (i >= network::PLACES) take_out(stash + (i - network::PLACES) * network::KEPT, kept(i));
      end_group_of_copies();
    }
  }
  if (mode == ONLY_FORWARD) return;
  __syncthreads();
  network::write_gradient(sums, shared, step.partials + blockIdx.x * network::CONVOLVED, step.mean, step.deviation);
  watch.mark(network::LEAVE);
}

// What the second phase does with a sum: the weight goes down the gradient or, where `gradient` is given, is left alone.
struct Weights {
  struct Now {
    float weight, velocity;
  };
  float* parameters;
  float* velocity;
  float* gradient;
  float learning_rate, momentum;

  __device__ __forceinline__ Now fetch(int i) const {
    return gradient ? Now{0.0f, 0.0f} : Now{load_l2(parameters + i), load_l2(velocity + i)};
  }
  __device__ __forceinline__ void change(int i, Now now, float sum) const {
    if (gradient) {
      gradient[i] = sum;
      return;
    }
    descend(now.weight, now.velocity, sum, learning_rate, momentum);
    parameters[i] = now.weight;
    velocity[i] = now.velocity;
  }
  // Those of a layer.
  __device__ __forceinline__ Weights from(int offset) const {
    return {parameters + offset, velocity + offset, gradient ? gradient + offset : nullptr, learning_rate, momentum};
  }
};

__device__ __forceinline__ void update(const Step& step, const Weights& weights, float* shared) {
  for (int job = blockIdx.x; job < network::JOBS; job += gridDim.x)
    network::sum_job(job, step.traces, step.partials, step.count, groups_of(step.count), shared, weights);
}

// The phases as launches of their own: for a device without barriers of the grid, and for what is no training.
ENTRY_BOUNDED(take_images, BLOCK)
(const unsigned char* images, const unsigned char* labels, const int* order, float* parameters, float* traces,
 float* partials, float* outputs, float* losses, float* stash, float mean, float deviation, int count, int mode) {
  SHARED_LARGE(Float4, quads_held, network::SHARED_QUADS);
  const Step step = {images, labels, order, parameters, traces, partials, outputs, losses, stash, mean, deviation, count};
  float* shared = reinterpret_cast<float*>(quads_held);
  Block block(step, shared, 1);
  take_images(step, mode, shared, block, Unwatched());
}

// The first phase of a training step, watched: spent (SECTIONS,) is added to, in ticks of the first block.
ENTRY_BOUNDED(watch_images, BLOCK)
(const unsigned char* images, const unsigned char* labels, const int* order, float* parameters, float* traces,
 float* partials, float* outputs, float* losses, float* stash, float mean, float deviation, int count,
 unsigned long long* spent) {
  SHARED_LARGE(Float4, quads_held, network::SHARED_QUADS);
  const Step step = {images, labels, order, parameters, traces, partials, outputs, losses, stash, mean, deviation, count};
  float* shared = reinterpret_cast<float*>(quads_held);
  Block block(step, shared, 1);
  take_images(step, TRAIN, shared, block, Watched{spent, 0});
}

ENTRY_BOUNDED(update, BLOCK)
(float* parameters, float* traces, float* partials, float* velocity, float* gradient, const float* learning_rate,
 float momentum, int apply, int count) {
  SHARED_LARGE(Float4, quads_held, network::SHARED_QUADS);
  Step step = {};
  step.traces = traces, step.partials = partials, step.count = count;
  update(step, {parameters, velocity, apply ? nullptr : gradient, *learning_rate, momentum},
         reinterpret_cast<float*>(quads_held));
}

#ifdef __CUDACC__

// `steps` whole steps in one launch. order (steps, count), learning_rates (steps,). All blocks must be resident; `arrived` and `failed` begin
// as 0, and `failed` ends as 1 when they were not.
ENTRY_BOUNDED(train, BLOCK)
(const unsigned char* images, const unsigned char* labels, const int* order, float* parameters, float* traces,
 float* partials, float* outputs, float* losses, float* stash, float mean, float deviation, int count, float* velocity,
 const float* learning_rates, float momentum, int steps, unsigned* arrived, unsigned* failed) {
  SHARED_LARGE(Float4, quads_held, network::SHARED_QUADS);
  float* shared = reinterpret_cast<float*>(quads_held);
  Step step = {images, labels, order, parameters, traces, partials, outputs, losses, stash, mean, deviation, count};
  Block block(step, shared, steps);
  unsigned wanted = 0;
  for (int s = 0; s < steps; s++, step.order += count) {
    const float learning_rate = learning_rates[s];  // asked for long before it is needed
    take_images(step, TRAIN, shared, block, Unwatched());
    if (!wait_for_grid(arrived, failed, wanted += gridDim.x)) return;
    update(step, {parameters, velocity, nullptr, learning_rate, momentum}, shared);
    if (!wait_for_grid(arrived, failed, wanted += gridDim.x)) return;
  }
}

#endif
