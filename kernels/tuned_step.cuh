// Stage tuned: a training step in two phases, with a barrier of the whole grid after each. In the first every block takes
// its images through the network alone, forward and back, with the weights in its shared memory, and leaves what the
// gradient needs: dense layers' sources and deltas (a trace an image), and its own sum of the convolutions' gradient. In
// the second every block sums the gradient of its share of the weights over the batch, in a fixed order, and updates them.
// Needs namespace network (generated): the layers' calls and the places of their arrays; and BLOCK (threads).
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

// errors = derivative of the batch's mean loss by the logits; one warp. The loss of the image is added to *loss.
__device__ __forceinline__ void lose(const float* logits, int label, int count, float* errors, float* loss) {
  constexpr unsigned ALL = 0xffffffffu;
  const int lane = threadIdx.x % 32;
  float largest = -INFINITY;
  for (int k = lane; k < network::CLASSES; k += 32) largest = fmaxf(largest, logits[k]);
  for (int bit = 16; bit; bit /= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, bit));
  float sum = 0.0f;
  for (int k = lane; k < network::CLASSES; k += 32) sum += expf(logits[k] - largest);
  for (int bit = 16; bit; bit /= 2) sum += __shfl_xor_sync(ALL, sum, bit);
  for (int k = lane; k < network::CLASSES; k += 32)
    errors[k] = (expf(logits[k] - largest) / sum - (k == label ? 1.0f : 0.0f)) / float(count);
  if (lane == 0) *loss += logf(sum) + largest - logits[label];
}

template <class Watch>
__device__ __forceinline__ void take_images(const Step& step, int mode, float* shared, Watch watch) {
  watch.mark(-1);
  network::Sums sums;
  network::clear(sums);
  network::hold(step.parameters, shared);
  for (int image = blockIdx.x; image < step.count; image += gridDim.x) {
    const int from = step.order[image];
    const unsigned char* bytes = step.images + static_cast<long long>(from) * network::IMAGE_SIZE;
    for (int i : block_range(network::IMAGE_SIZE))
      shared[network::IMAGE + i] = (float(bytes[i]) - step.mean) / step.deviation;
    __syncthreads();
    watch.mark(network::INPUT);
    network::forward(step.parameters, shared, watch);
    float* errors = shared + network::ERRORS;
    float* outputs = step.outputs + image * network::CLASSES;
    if (mode == ONLY_FORWARD) {
      for (int k : block_range(network::CLASSES)) outputs[k] = shared[network::LOGITS + k];
    } else if (mode == GIVEN_ERRORS) {
      for (int k : block_range(network::CLASSES)) errors[k] = outputs[k];
    } else if (threadIdx.x < 32) {
      lose(shared + network::LOGITS, step.labels[from], step.count, errors, step.losses + image);
    }
    __syncthreads();
    watch.mark(network::LOSS);
    if (mode == ONLY_FORWARD) continue;
    network::backward(step.parameters, shared, sums, step.traces + image * network::TRACE, watch);
  }
  wait_for_copies();  // of a block without images
  __syncthreads();
  if (mode != ONLY_FORWARD && static_cast<int>(blockIdx.x) < groups_of(step.count))
    network::write_gradient(sums, shared, step.partials + blockIdx.x * network::CONVOLVED);
  watch.mark(network::LEAVE);
}

// The second phase. `apply`: whether the weights go down the gradient; if not, it is written to `gradient`.
__device__ __forceinline__ void update(const Step& step, float* velocity, float* gradient, float learning_rate,
                                       float momentum, int apply, float* shared) {
  const auto done = [&](int i, float sum) {
    if (!apply) {
      gradient[i] = sum;
      return;
    }
    float weight = fresh(step.parameters + i), speed = fresh(velocity + i);
    descend(weight, speed, sum, learning_rate, momentum);
    step.parameters[i] = weight;
    velocity[i] = speed;
  };
  for (int job = blockIdx.x; job < network::JOBS; job += gridDim.x)
    network::sum_job(job, step.traces, step.partials, step.count, groups_of(step.count), shared, done);
}

// The phases as launches of their own: for a device without barriers of the grid, and for what is no training.
ENTRY_BOUNDED(take_images, BLOCK)
(const unsigned char* images, const unsigned char* labels, const int* order, float* parameters, float* traces,
 float* partials, float* outputs, float* losses, float mean, float deviation, int count, int mode) {
  SHARED_LARGE(Quad, quads_held, network::SHARED_QUADS);
  const Step step = {images, labels, order, parameters, traces, partials, outputs, losses, mean, deviation, count};
  take_images(step, mode, reinterpret_cast<float*>(quads_held), Unwatched());
}

// The first phase of a training step, watched: spent (SECTIONS,) is added to, in ticks of the first block.
ENTRY_BOUNDED(watch_images, BLOCK)
(const unsigned char* images, const unsigned char* labels, const int* order, float* parameters, float* traces,
 float* partials, float* outputs, float* losses, float mean, float deviation, int count, unsigned long long* spent) {
  SHARED_LARGE(Quad, quads_held, network::SHARED_QUADS);
  const Step step = {images, labels, order, parameters, traces, partials, outputs, losses, mean, deviation, count};
  take_images(step, TRAIN, reinterpret_cast<float*>(quads_held), Watched{spent, 0});
}

ENTRY_BOUNDED(update, BLOCK)
(float* parameters, float* traces, float* partials, float* velocity, float* gradient, float learning_rate,
 float momentum, int apply, int count) {
  SHARED_LARGE(Quad, quads_held, network::SHARED_QUADS);
  const Step step = {nullptr, nullptr, nullptr, parameters, traces, partials, nullptr, nullptr, 0.0f, 1.0f, count};
  update(step, velocity, gradient, learning_rate, momentum, apply, reinterpret_cast<float*>(quads_held));
}

#ifdef __CUDACC__

// `steps` whole steps in one launch. order (steps, count). All blocks must be resident; `arrived` and `failed` begin
// as 0, and `failed` ends as 1 when they were not.
ENTRY_BOUNDED(train, BLOCK)
(const unsigned char* images, const unsigned char* labels, const int* order, float* parameters, float* traces,
 float* partials, float* outputs, float* losses, float mean, float deviation, int count, float* velocity,
 float* gradient, float learning_rate, float momentum, int steps, unsigned* arrived, unsigned* failed) {
  SHARED_LARGE(Quad, quads_held, network::SHARED_QUADS);
  float* shared = reinterpret_cast<float*>(quads_held);
  Step step = {images, labels, order, parameters, traces, partials, outputs, losses, mean, deviation, count};
  unsigned wanted = 0;
  for (int s = 0; s < steps; s++, step.order += count) {
    take_images(step, TRAIN, shared, Unwatched());
    if (!wait_for_grid(arrived, failed, wanted += gridDim.x)) return;
    update(step, velocity, gradient, learning_rate, momentum, 1, shared);
    if (!wait_for_grid(arrived, failed, wanted += gridDim.x)) return;
  }
}

#endif
