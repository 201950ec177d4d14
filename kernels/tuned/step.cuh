// Stage tuned: whole training steps in one launch, by blocks that stay (a persistent kernel).
//
// A step has two phases, with a barrier of the whole grid after each.
//   forward_backward  Every block takes its images through the network alone, forward and back, with the weights in its
//                     shared memory, and leaves what the gradient needs: dense layers' sources and deltas (a trace an
//                     image), and its own sum of the convolutions' gradient (a partial sum a block).
//   update            Every block sums the gradient of its share of the weights over the batch, in a fixed order, and
//                     updates them.
// Up to the first dense layer each team of a block takes one image at a time, so that one team computes while another
// waits; from there on the block takes IMAGES together.
//
// The generated unit (`python -m cnnlib show-source --stage tuned`) has numbers alone: a struct for each layer, one for
// the plan, and the list of the layers:
//   using PerImage = tuned::PerImage<tuned::ByteConv<conv1, plan::Threads>, tuned::Conv<conv2, plan::Threads>>;
//   using PerBatch = tuned::PerBatch<tuned::Dense<dense1, plan::Threads>>;
//   using Net = tuned::Network<plan, PerImage, PerBatch>;
//   TUNED_ENTRY_POINTS(Net)
// Plan has:
//   Threads (team.cuh), IMAGES (that a block takes together), IMAGE_SIZE, CHANNELS, WIDTH, CLASSES
//   BORDER_ROWS, BORDER_COLUMNS: of zeros around the image where it lies in shared memory
//   LOSS (enum Loss), WEIGHT_DECAY (a float)
//   BYTES: the first layer takes pixels as two numbers a word, FP16 if PLANES and else BF16; without it, it takes
//     normalised floats
//   KEPT: floats of an image that lie at the beginning of shared memory from forward to backward
//   SLOTS: places of that size, used in turn
//   TRACE, PARTIALS: floats of an image's trace, and of a block's partial sums
//   SHARED_BYTES, SHUFFLE_ROUNDS
//   Buffers: Image, Logits, Errors, Labels, BulkCopies (the barrier of bulk copies)
#pragma once
#include <type_traits>

#include "../shuffle.cuh"
#include "byte_conv.cuh"
#include "byte_plane_conv.cuh"
#include "context.cuh"
#include "conv.cuh"
#include "dense.cuh"
#include "dropout.cuh"
#include "elementwise.cuh"
#include "grid.cuh"
#include "plane_conv.cuh"
#include "reduce.cuh"
#include "stamps.cuh"

namespace tuned {

enum Mode { TRAIN, ONLY_FORWARD, GIVEN_ERRORS };
enum Loss { CROSS_ENTROPY, MEAN_SQUARED_ERROR };
// Sections of the first phase in a profile. Behind LAYERS come those of the layers, forward and then backward.
enum Section { INPUT, LOSS, LEAVE, LAYERS };

// What both phases of a step work on.
struct Step {
  const unsigned char* images;  // (N, IMAGE_SIZE)
  const unsigned char* labels;  // (N,)
  const int* order;             // (count,): which of them make the batch
  float* parameters;
  float* traces;    // (count, TRACE)
  float* partials;  // (groups, PARTIALS): sums of the convolutions' gradient, a block's each
  float* outputs;   // (count, CLASSES): logits or, where errors are given, those
  float* losses;    // (count,), added to
  float* stash;     // (grid, IMAGES, KEPT): what backward will ask for, while a block takes other images forward
  Levels levels;
  int seed_low, seed_high, number;  // of dropout's masks: the training's seed, and steps done before this one
  int count;
};

// Blocks that have images: block b takes images b, b + grid, ...
__device__ __forceinline__ int groups_of(int count) { return min(static_cast<int>(gridDim.x), count); }

// *at += value, where no other thread adds meanwhile; the thread does not wait for it.
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

// errors = derivative of the batch's mean loss by the logits, share = 1 / images of the batch; one warp. The loss of
// the image is added to *loss.
template <int CLASSES>
__device__ __forceinline__ void softmax_cross_entropy(const float* logits, int label, float share, float* errors,
                                                      float* loss) {
  constexpr unsigned ALL = 0xffffffffu;
  constexpr int LANES = lanes_for(CLASSES);
  const int lane = threadIdx.x % LANES;  // the others do the same once more
  float largest = -INFINITY;
  for (int k = lane; k < CLASSES; k += LANES) largest = fmaxf(largest, logits[k]);
  for (int bit = LANES / 2; bit; bit /= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, bit));
  float sum = 0.0f, last = 0.0f;
  for (int k = lane; k < CLASSES; k += LANES) sum += last = expf(logits[k] - largest);
  for (int bit = LANES / 2; bit; bit /= 2) sum += __shfl_xor_sync(ALL, sum, bit);
  const float part = share / sum;
  for (int k = lane; k < CLASSES; k += LANES) {
    const float own = CLASSES <= LANES ? last : expf(logits[k] - largest);
    errors[k] = k == label ? own * part - share : own * part;
  }
  if (threadIdx.x % 32 == 0) red_add(loss, logf(sum) + largest - logits[label]);
}

// As above, for the mean over the classes of (logit - one-hot)^2.
template <int CLASSES>
__device__ __forceinline__ void mean_squared_error(const float* logits, int label, float share, float* errors,
                                                   float* loss) {
  constexpr unsigned ALL = 0xffffffffu;
  float sum = 0.0f;
  for (int k = threadIdx.x % 32; k < CLASSES; k += 32) {
    const float difference = logits[k] - (k == label ? 1.0f : 0.0f);
    sum = fmaf(difference, difference, sum);
    errors[k] = difference * (2.0f / float(CLASSES)) * share;
  }
  for (int bit = 16; bit; bit /= 2) sum += __shfl_xor_sync(ALL, sum, bit);
  if (threadIdx.x % 32 == 0) red_add(loss, sum / float(CLASSES));
}

// A team's next image on its way from device memory, each thread's share of the bytes in its registers.
template <class Plan>
struct NextImage {
  using Threads = typename Plan::Threads;
  static constexpr int TEAM = Threads::TEAM, TEAMS = Threads::TEAMS, IMAGE_SIZE = Plan::IMAGE_SIZE;
  static constexpr int PIXELS = ceil_div(IMAGE_SIZE, TEAM);
  // The image with its border, as it lies in shared memory.
  static constexpr int CHANNELS = Plan::CHANNELS, WIDTH = Plan::WIDTH, HEIGHT = IMAGE_SIZE / (CHANNELS * WIDTH);
  static constexpr int BORDER_ROWS = Plan::BORDER_ROWS, BORDER_COLUMNS = Plan::BORDER_COLUMNS;
  static constexpr int ALL_ROWS = HEIGHT + 2 * BORDER_ROWS, ALL_COLUMNS = WIDTH + 2 * BORDER_COLUMNS;
  static constexpr int PLACES = CHANNELS * ALL_ROWS * ALL_COLUMNS, ZEROS = PLACES - IMAGE_SIZE;
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
  static __device__ __forceinline__ int first_image() { return blockIdx.x + Threads::team() * gridDim.x; }
  __device__ __forceinline__ void find() { next = steps > 0 ? order[image] : -1; }

  __device__ __forceinline__ void fetch(const Step& step) {
    if (next < 0) return;
    const unsigned char* bytes = step.images + static_cast<long long>(next) * IMAGE_SIZE;
    UNROLL_FOR(int n = 0; n < PIXELS; n++)
      if (Threads::thread_rank() + n * TEAM < IMAGE_SIZE) byte[n] = bytes[Threads::thread_rank() + n * TEAM];
    label = step.labels[next];
    image += TEAMS * gridDim.x;
    if (image >= step.count) image = first_image(), order += step.count, steps--;
    find();
  }

  // Where pixel `i` of the image lies within its border.
  static __device__ __forceinline__ int place_of(int i) {
    if (ZEROS == 0) return i;
    const int line = i / WIDTH, channel = line / HEIGHT;
    return ((2 * channel + 1) * BORDER_ROWS + line) * ALL_COLUMNS + BORDER_COLUMNS + i % WIDTH;
  }
  // Where number `i` of the border lies: of each channel the rows above and below, then what is beside its own rows.
  static __device__ __forceinline__ int place_of_zero(int i) {
    constexpr int OF_ROWS = 2 * BORDER_ROWS * ALL_COLUMNS, ALL = ZEROS ? ZEROS / CHANNELS : 1;
    constexpr int BESIDE = BORDER_COLUMNS ? 2 * BORDER_COLUMNS : 1;
    const int channel = i / ALL, at = i % ALL, beside = at - OF_ROWS;
    const int row = at < OF_ROWS ? at / ALL_COLUMNS : BORDER_ROWS + beside / BESIDE;
    const int column = at < OF_ROWS ? at % ALL_COLUMNS : beside % BESIDE;
    return (channel * ALL_ROWS + row + (at < OF_ROWS && row >= BORDER_ROWS ? HEIGHT : 0)) * ALL_COLUMNS + column +
           (at >= OF_ROWS && column >= BORDER_COLUMNS ? WIDTH : 0);
  }

  // As a number of the first of two in its own word, and of the second in the word before.
  static __device__ __forceinline__ void put(unsigned short* halves, int place, unsigned short number) {
    halves[2 * place] = number;
    halves[place ? 2 * place - 1 : 2 * PLACES - 1] = place ? number : 0;
  }

  // image: normalised floats or, with BYTES, words of a pixel and the one behind it. If there is none, an empty one, so
  // that every team does the same; its errors will be 0. The border is written each time, since other arrays lie over
  // the image when no image is left.
  __device__ __forceinline__ void arrive(const Step& step, bool any, float* there, int* label_there) const {
    UNROLL_FOR(int n = 0; n < PIXELS; n++) {
      const int i = Threads::thread_rank() + n * TEAM;
      if (i >= IMAGE_SIZE) break;
      const int pixel = any ? byte[n] : 0;
      if (Plan::BYTES) {
        put(reinterpret_cast<unsigned short*>(there), place_of(i), Plan::PLANES ? to_fp16(pixel) : to_bf16(pixel));
      } else {
        const int channel = i / (IMAGE_SIZE / CHANNELS);
        there[place_of(i)] = (float(pixel) - step.levels.template mean_of<CHANNELS>(channel)) /
                             step.levels.template deviation_of<CHANNELS>(channel);
      }
    }
    if constexpr (ZEROS > 0) {
      for (int i = Threads::thread_rank(); i < ZEROS; i += TEAM) {
        if (Plan::BYTES)
          put(reinterpret_cast<unsigned short*>(there), place_of_zero(i), 0);
        else
          there[place_of_zero(i)] = 0.0f;
      }
    }
    if (Threads::thread_rank() == 0) *label_there = any ? label : 0;
  }
};

// How a block leaves what the second phase needs: in arrays that other blocks read behind a barrier of the grid...
struct BehindBarriers {
  static constexpr bool STAMPED = false;
  using Row = float*;
  const Step& step;
  __device__ __forceinline__ Row traces() const { return step.traces; }
  __device__ __forceinline__ Row partials() const { return step.partials; }
};

// ...or number by number, each with the step's stamp, from which this block takes the convolutions' weights likewise.
struct ByStamps {
  static constexpr bool STAMPED = true;
  using Row = StampedRow;
  Handed handed;
  unsigned stamp;
  int done;                 // steps done before in this launch, after which weights come stamped
  bool dense_copies_begun;  // in this step; known to the first warp. The first step begins with them
  Patience& patience;
  __device__ __forceinline__ Row traces() const { return {handed.traces, stamp}; }
  __device__ __forceinline__ Row partials() const { return {handed.partials, stamp}; }
};

// Lists of layers: a team takes one image at a time through the first, a block several together through the second.
template <class... Layers>
struct PerImage {};
template <class... Layers>
struct PerBatch {};

// One layer's accumulators, so that those of all are base classes of one type each.
template <class Layer>
struct AccumulatorsOf {
  typename Layer::Accumulators own;
};

// The sequence of layers: the only place that says in which order their functions are called.
template <class Plan, class ImageLayers, class BatchLayers>
struct Network;

template <class Plan_, class... Single, class... Together>
struct Network<Plan_, PerImage<Single...>, PerBatch<Together...>> {
  using Plan = Plan_;
  using Threads = typename Plan::Threads;
  static constexpr int COUNT = sizeof...(Single) + sizeof...(Together);
  // Sections behind those of the layers: waiting for all blocks after the first phase, the update, waiting after it.
  static constexpr int WAIT = LAYERS + 2 * COUNT, UPDATE = WAIT + 1, WAIT_AGAIN = WAIT + 2;
  static_assert((Single::PARTIALS + ... + 0) + (Together::PARTIALS + ... + 0) == Plan::PARTIALS,
                "partial sums lie one behind the other");

  struct Accumulators : AccumulatorsOf<Single>..., AccumulatorsOf<Together>... {
    template <class Layer>
    __device__ __forceinline__ typename Layer::Accumulators& of() {
      return static_cast<AccumulatorsOf<Layer>&>(*this).own;
    }
    __device__ __forceinline__ void clear() {
      (Single::clear(of<Single>()), ...);
      (Together::clear(of<Together>()), ...);
    }
  };

  template <class Layer>
  static __host__ __device__ constexpr int index_of() {
    int index = 0;
    bool found = false;
    ((found = found || std::is_same<Layer, Single>::value, index += !found), ...);
    ((found = found || std::is_same<Layer, Together>::value, index += !found), ...);
    return index;
  }

  static __device__ __forceinline__ void prepare(float* shared) {
    (Single::prepare(shared), ...);
    (Together::prepare(shared), ...);
  }

  // Weights on their way into shared memory: what convolutions need is waited for, what dense layers need arrives while
  // convolutions work.
  template <class Context>
  static __device__ __forceinline__ void load_weights(Context& c) {
    (Single::copy_weights(c), ...);
    end_group_of_copies();
    copy_dense_weights(c);
    if constexpr ((Single::COPIES || ... || false)) {
      wait_for_groups<1>();
      __syncthreads();
      (Single::convert_weights(c), ...);
      if (Threads::TEAMS > 1) __syncthreads();  // teams do not wait for each other before the first image
    }
  }
  template <class Context>
  static __device__ __forceinline__ void copy_dense_weights(Context& c) {
    if constexpr ((Together::STREAMS || ... || false)) {
      constexpr int BYTES = (Together::BULK_BYTES + ... + 0);
      c.bulk_copies.pending = BYTES > 0;
      if (c.bulk_copies.pending && begins_bulk_copies()) {
        fence_async_proxy();
        expect_bytes(c.bulk_copies, BYTES);
        (Together::copy_weights_in_bulk(c), ...);
      }
      (Together::stream_weights(c), ...);
    }
    end_group_of_copies();
  }

  // Whether dense layers' weights can be copied by the first warp alone, as soon as all of their tiles have been updated.
  static constexpr bool ONE_WARP_COPIES = (Together::ONE_WARP_COPIES && ... && true);

  // The first warp: begins to copy dense layers' weights if all of their tiles are there; it waits for them if `must`.
  template <class Context>
  static __device__ __forceinline__ void begin_dense_copies(Context& c, ByStamps& exchange, bool must) {
    const unsigned wanted = static_cast<unsigned>(exchange.done) * BATCH_TILES;
    int ready = 0;
    if (threadIdx.x == 0) {
      if (must) exchange.patience.wait_for(exchange.handed.dense_tiles, wanted);
      ready = must || static_cast<int>(load_acquire(exchange.handed.dense_tiles) - wanted) >= 0;
    }
    if (!__shfl_sync(0xffffffffu, ready, 0)) return;
    exchange.dense_copies_begun = true;
    if (threadIdx.x == 0) {
      fence_async_proxy();
      expect_bytes(c.bulk_copies, (Together::BULK_BYTES + ... + 0));
    }
    __syncwarp();
    (Together::copy_weights_by_warp(c), ...);
  }

  // The weights of a step after the first: as load_weights, but they come from blocks that may not be done with them.
  template <class Context>
  static __device__ __forceinline__ void take_weights(Context& c, ByStamps& exchange) {
    if constexpr (BATCH_TILES > 0) {
      c.bulk_copies.pending = true;
      if (threadIdx.x < 32) begin_dense_copies(c, exchange, false);
    }
    constexpr int EACH = ceil_div(Plan::PARTIALS, Threads::BLOCK), TOGETHER = EACH < 16 ? EACH : 16;
#pragma unroll 1
    for (int first = threadIdx.x; first < Plan::PARTIALS; first += TOGETHER * Threads::BLOCK) {
      float value[TOGETHER];
      take_stamped<true>(
          value,
          [&](int n) -> const Stamped* {
            const int i = first + n * Threads::BLOCK;
            return i < Plan::PARTIALS ? exchange.handed.weights + i : nullptr;
          },
          exchange.stamp - 1, exchange.patience);
      UNROLL_FOR(int n = 0; n < TOGETHER; n++)
        (Single::place_weight(c.shared, first + n * Threads::BLOCK, value[n]), ...);
    }
    __syncthreads();
    (Single::convert_weights(c), ...);
  }

  // Each layer has its own instance of these, and so a barrier of its own: the emulated device sees when threads have
  // come to different ones.
  template <class Layer, class Context>
  static __device__ __forceinline__ void forward_one(Context& c, int slot) {
    Layer::forward(c, slot);
    Threads::template team_barrier<Layer>();
    c.timer.mark(LAYERS + index_of<Layer>());
  }
  template <class Layer, class Context>
  static __device__ __forceinline__ void backward_one(Context& c, int slot, Accumulators& sums) {
    Layer::backward(c, slot, sums.template of<Layer>());
    Threads::template team_barrier<Layer>();
    c.timer.mark(LAYERS + COUNT + index_of<Layer>());
  }
  template <class Layer, class Context>
  static __device__ __forceinline__ void forward_batch(Context& c) {
    Layer::forward(c, 0);
    __syncthreads();
    c.timer.mark(LAYERS + index_of<Layer>());
  }
  template <class Layer, class Context>
  static __device__ __forceinline__ void backward_batch(Context& c, Accumulators& sums) {
    Layer::backward(c, 0, sums.template of<Layer>());
    __syncthreads();
    c.timer.mark(LAYERS + COUNT + index_of<Layer>());
  }

  // All threads of a team: image `slot` up to the first dense layer, and back from it.
  template <class Context, class Given>
  static __device__ __forceinline__ void forward_image(Context& c, int slot, Given& exchange) {
    (forward_one_of<Single>(c, slot, exchange), ...);
  }
  // The last moment to begin copies that the dense layers need is behind the first layer.
  template <class Layer, class Context, class Given>
  static __device__ __forceinline__ void forward_one_of(Context& c, int slot, Given& exchange) {
    forward_one<Layer>(c, slot);
    if constexpr (Given::STAMPED && BATCH_TILES > 0 && index_of<Layer>() == 0)
      if (threadIdx.x < 32 && !exchange.dense_copies_begun) begin_dense_copies(c, exchange, true);
  }
  template <class Context>
  static __device__ __forceinline__ void backward_image(Context& c, int slot, Accumulators& sums) {
    backward_image_from(PerImage<Single...>(), c, slot, sums);
  }
  // All threads of a block: the images that it takes together, from the first dense layer to the logits, and back.
  template <class Context>
  static __device__ __forceinline__ void forward_images(Context& c) {
    wait_for_bulk_copies(c.bulk_copies);
    wait_for_copies();
    (forward_batch<Together>(c), ...);
  }
  template <class Context>
  static __device__ __forceinline__ void backward_images(Context& c, Accumulators& sums) {
    backward_images_from(PerBatch<Together...>(), c, sums);
  }

  // Last to first.
  template <class Context>
  static __device__ __forceinline__ void backward_image_from(PerImage<>, Context&, int, Accumulators&) {}
  template <class Layer, class... Later, class Context>
  static __device__ __forceinline__ void backward_image_from(PerImage<Layer, Later...>, Context& c, int slot,
                                                             Accumulators& sums) {
    backward_image_from(PerImage<Later...>(), c, slot, sums);
    backward_one<Layer>(c, slot, sums);
  }
  template <class Context>
  static __device__ __forceinline__ void backward_images_from(PerBatch<>, Context&, Accumulators&) {}
  template <class Layer, class... Later, class Context>
  static __device__ __forceinline__ void backward_images_from(PerBatch<Layer, Later...>, Context& c,
                                                              Accumulators& sums) {
    backward_images_from(PerBatch<Later...>(), c, sums);
    backward_batch<Layer>(c, sums);
  }

  // partials (Plan::PARTIALS,): this block's sum of the convolutions' gradient. When no image is left.
  template <class Context, class Row>
  static __device__ __forceinline__ void store_gradient(Context& c, Accumulators& sums, Row partials) {
    (Single::stage_gradient(c, sums.template of<Single>()), ...);
    if (Plan::PARTIALS > 0) __syncthreads();
    (Single::store_gradient(c, partials), ...);
    if (Plan::PARTIALS > 0) __syncthreads();
  }

  // Second phase: tile `tile` of all layers' gradients.
  static constexpr int IMAGE_TILES = (Single::TILES + ... + 0), BATCH_TILES = (Together::TILES + ... + 0);
  static constexpr int TILES = IMAGE_TILES + BATCH_TILES;
  template <class Gradients>
  static __device__ __forceinline__ void reduce_tile(int tile, Gradients& gradients, float* shared,
                                                     const Update& update) {
    if constexpr (IMAGE_TILES > 0)
      if (tile < IMAGE_TILES) return reduce_image_tile(tile, gradients, shared, update);
    if constexpr (BATCH_TILES > 0) reduce_batch_tile(tile - IMAGE_TILES, gradients, shared, update);
  }
  // Of the layers that take one image at a time, and of the others: one function for all of a kind, whose code is small.
  template <class Gradients>
  static __device__ __forceinline__ void reduce_image_tile(int tile, Gradients& gradients, float* shared,
                                                           const Update& update) {
    const PartialsSizes sizes = partials_of(PerBatch<Single...>(), tile);
    const int first = tile * PARTIALS_TILE;
    constexpr int TRACE = BATCH_TILES > 0 ? Plan::TRACE : 0;
    reduce_partials<Threads, Plan::PARTIALS, TRACE>(gradients, sizes.first_partial + first,
                                                    min(PARTIALS_TILE, sizes.parameters - first), shared,
                                                    update.from(sizes.first_weight + first));
  }
  // As sizes_of.
  static __device__ __forceinline__ PartialsSizes partials_of(PerBatch<>, int&) { return {}; }
  template <class Layer, class... Later>
  static __device__ __forceinline__ PartialsSizes partials_of(PerBatch<Layer, Later...>, int& tile) {
    if constexpr (Layer::TILES > 0) {
      if (tile < Layer::TILES) return Layer::PARTIALS_SIZES;
      tile -= Layer::TILES;
    }
    return partials_of(PerBatch<Later...>(), tile);
  }
  template <class Gradients>
  static __device__ __forceinline__ void reduce_batch_tile(int tile, Gradients& gradients, float* shared,
                                                           const Update& update) {
    const DenseSizes sizes = sizes_of(PerBatch<Together...>(), tile);
    decltype(update_of(PerBatch<Together...>()))::reduce_tile(sizes, tile, gradients, shared, update);
  }
  // Sizes of the layer that has tile `tile`, which then counts from the layer's first.
  static __device__ __forceinline__ DenseSizes sizes_of(PerBatch<>, int&) { return {}; }
  template <class Layer, class... Later>
  static __device__ __forceinline__ DenseSizes sizes_of(PerBatch<Layer, Later...>, int& tile) {
    if constexpr (Layer::TILES > 0) {
      if (tile < Layer::TILES) return Layer::SIZES;
      tile -= Layer::TILES;
    }
    return sizes_of(PerBatch<Later...>(), tile);
  }
  // The DenseUpdate of the first layer that has tiles; that of the others is the same type.
  template <class Layer, class... Later>
  static __device__ __forceinline__ auto update_of(PerBatch<Layer, Later...>) {
    if constexpr (Layer::TILES > 0)
      return typename Layer::template UpdateOf<Plan::TRACE>();
    else
      return update_of(PerBatch<Later...>());
  }
};

// What a block has from one step to the next.
template <class Net>
struct Block {
  NextImage<typename Net::Plan> next_image;
  BulkCopyBarrier bulk_copies;

  // All threads, when a launch begins.
  __device__ __forceinline__ Block(const Step& step, float* shared, int steps) {
    bulk_copies = {reinterpret_cast<unsigned long long*>(Net::Plan::BulkCopies::all(shared)), 0, false};
    if (threadIdx.x == 0) init_bulk_copies(bulk_copies.arrived);
    Net::prepare(shared);
    next_image.begin(step, steps);
    __syncthreads();
  }
};

// What is kept of an image, to and from device memory; all threads of a team.
template <class Plan>
__device__ __forceinline__ void put_away(const float* kept, float* stash) {
  for (int i = Plan::Threads::thread_rank(); i < Plan::KEPT / 4; i += Plan::Threads::TEAM)
    reinterpret_cast<Float4*>(stash)[i] = reinterpret_cast<const Float4*>(kept)[i];
}
template <class Plan>
__device__ __forceinline__ void take_out(const float* stash, float* kept) {
  for (int i = Plan::Threads::thread_rank(); i < Plan::KEPT / 4; i += Plan::Threads::TEAM)
    copy_async(reinterpret_cast<Float4*>(kept) + i, reinterpret_cast<const Float4*>(stash) + i);
}

// The first phase. block.next_image is the team's first image, if it has any, and in the end its first of the next
// step.
template <class Net, class Timer, class Exchange>
__device__ __forceinline__ void forward_backward(const Step& step, int mode, float* shared, Block<Net>& block,
                                                 Timer timer, Exchange exchange) {
  using Plan = typename Net::Plan;
  using Threads = typename Net::Threads;
  constexpr int IMAGES = Plan::IMAGES, TEAMS = Threads::TEAMS, SLOTS = Plan::SLOTS, KEPT = Plan::KEPT;
  constexpr int CLASSES = Plan::CLASSES;
  const int grid = gridDim.x;
  if (static_cast<int>(blockIdx.x) >= step.count) return;
  timer.mark(-1);
  const float share = 1.0f / float(step.count);
  typename Net::Accumulators sums;
  sums.clear();
  const Moment moment(step.seed_low, step.seed_high, step.number, mode != ONLY_FORWARD);
  Context<Timer, typename Exchange::Row> c = {
      shared, step.parameters, step.levels, block.bulk_copies, timer, {}, 0, 0, moment, 0};
  if constexpr (Exchange::STAMPED) {
    if (exchange.done)
      Net::take_weights(c, exchange);
    else
      Net::load_weights(c);
  } else {
    Net::load_weights(c);
  }
  int* labels = reinterpret_cast<int*>(Plan::Labels::all(shared));
  // What is kept of an image lies first of all, in SLOTS places by turns, so that one image comes or goes while the
  // other is worked on.
  const auto kept = [&](int i) { return shared + i % SLOTS * KEPT; };
  float* stash = step.stash + static_cast<long long>(blockIdx.x) * IMAGES * KEPT;
  for (int first = blockIdx.x; first < step.count; first += grid * IMAGES) {
    const int here = min(IMAGES, (step.count - first + grid - 1) / grid);
    c.first = first;
    const int rounds = (here + TEAMS - 1) / TEAMS;
    for (int round = 0; round < rounds; round++) {
      const int i = round * TEAMS + Threads::team();
      block.next_image.arrive(step, i < here, Plan::Image::image(shared, i), labels + i);
      if (i < here) block.next_image.fetch(step);
      Threads::template team_barrier<Step>();
      timer.mark(INPUT);
      Net::forward_image(c, i, exchange);
      // the last ones stay where they are
      if (i + SLOTS < rounds * TEAMS && mode != ONLY_FORWARD) put_away<Plan>(kept(i), stash + i * KEPT);
    }
    Net::forward_images(c);
    for (int i = threadIdx.x / 32; i < here; i += Threads::WARPS) {
      const int image = first + i * grid, lane = threadIdx.x % 32;
      const float* logits = Plan::Logits::image(shared, i);
      float* errors = Plan::Errors::image(shared, i);
      float* outputs = step.outputs + image * CLASSES;
      if (mode == ONLY_FORWARD)
        for (int k = lane; k < CLASSES; k += 32) outputs[k] = logits[k];
      else if (mode == GIVEN_ERRORS)
        for (int k = lane; k < CLASSES; k += 32) errors[k] = outputs[k];
      else if (Plan::LOSS == MEAN_SQUARED_ERROR)
        mean_squared_error<CLASSES>(logits, labels[i], share, errors, step.losses + image);
      else
        softmax_cross_entropy<CLASSES>(logits, labels[i], share, errors, step.losses + image);
    }
    __syncthreads();
    timer.mark(LOSS);
    if (mode == ONLY_FORWARD) continue;
    c.trace = exchange.traces() + static_cast<long long>(first) * Plan::TRACE;
    c.trace_stride = grid * Plan::TRACE, c.here = here;
    Net::backward_images(c, sums);
    for (int round = rounds - 1; round >= 0; round--) {
      const int i = round * TEAMS + Threads::team();
      if (i + SLOTS < rounds * TEAMS) {
        wait_for_groups<1>();
        Threads::template team_barrier<Gradients>();
        timer.mark(INPUT);
      }
      Net::backward_image(c, i, sums);
      if (i >= SLOTS) take_out<Plan>(stash + (i - SLOTS) * KEPT, kept(i));
      end_group_of_copies();
    }
  }
  if (mode == ONLY_FORWARD) return;
  __syncthreads();
  Net::store_gradient(c, sums, exchange.partials() + blockIdx.x * Plan::PARTIALS);
  timer.mark(LEAVE);
}

template <class Net, class Timer>
__device__ __forceinline__ void forward_backward(const Step& step, int mode, float* shared, Block<Net>& block,
                                                 Timer timer) {
  forward_backward<Net>(step, mode, shared, block, timer, BehindBarriers{step});
}

// The second phase.
template <class Net>
__device__ __forceinline__ void update(const Step& step, const Update& how, float* shared) {
  Gradients gradients = {step.traces, step.partials, step.count, groups_of(step.count)};
  for (int tile = blockIdx.x; tile < Net::TILES; tile += gridDim.x) Net::reduce_tile(tile, gradients, shared, how);
}

// A launch whose blocks do not all come leaves a loss that is no number, so that the host has to look for the reason
// only where it finds one.
__device__ __forceinline__ void give_up(const Step& step) {
  if (threadIdx.x == 0) step.losses[0] = NAN;
}

// The second phase, where no barrier stands between the phases, by the blocks without an image. Dense layers' tiles come
// first, since what they need comes first.
template <class Net>
__device__ __forceinline__ void update_stamped(StampedGradients& gradients, const Update& how, float* shared) {
  const int workers = gridDim.x - gradients.count, worker = static_cast<int>(blockIdx.x) - gradients.count;
  if (worker < 0) return;
  if constexpr (Net::BATCH_TILES > 0)
#pragma unroll 1
    for (int tile = worker; tile < Net::BATCH_TILES; tile += workers) {
      Net::reduce_batch_tile(tile, gradients, shared, how);
      if (threadIdx.x == 0) add_release(gradients.from.dense_tiles);
    }
#pragma unroll 1
  for (int tile = workers - 1 - worker; tile < Net::IMAGE_TILES; tile += workers)
    Net::reduce_image_tile(tile, gradients, shared, how);
}

// Whole steps without a barrier of the grid. A block may be a step ahead of another, but no number is overwritten before
// all have read it: a block stamps a step's traces and sums when it has all weights of the step before, for which all of
// that step's numbers had been read.
template <class Net, class Marks>
__device__ __forceinline__ void train_stamped(Step& step, float* shared, float* velocity, const float* learning_rates,
                                              float momentum, int steps, const Handed& handed, unsigned stamp,
                                              Marks marks) {
  static_assert(Net::Plan::PARTIALS > 0, "convolutions' weights come stamped");
  static_assert(Net::Plan::IMAGES == 1 && Net::Threads::TEAMS == 1, "a block has one image at most");
  static_assert(Net::ONE_WARP_COPIES, "dense layers' weights lie in shared memory as they do in device memory");
  Block<Net> block(step, shared, steps);
  Patience patience = {handed.failed, false};
  for (int s = 0; s < steps; s++, step.order += step.count, step.number++, stamp++) {
    const float learning_rate = learning_rates[s];  // asked for long before it is needed
    marks.mark(-1);
    forward_backward<Net>(step, TRAIN, shared, block, marks, ByStamps{handed, stamp, s, s == 0, patience});
    marks.mark(Net::WAIT);
    StampedGradients gradients = {handed, stamp, step.count, step.count, patience};
    update_stamped<Net>(gradients,
                        {step.parameters, velocity, nullptr, learning_rate, momentum, Net::Plan::WEIGHT_DECAY}, shared);
    marks.mark(Net::UPDATE);
    if (__syncthreads_or(patience.given_up)) return give_up(step);
    marks.mark(Net::WAIT_AGAIN);
  }
}

#ifdef __CUDACC__
// Whole steps: both phases, each followed by a barrier of the grid.
template <class Net>
__device__ __forceinline__ void train(Step& step, float* shared, float* velocity, const float* learning_rates,
                                      float momentum, int steps, unsigned* arrived, unsigned* failed) {
  Block<Net> block(step, shared, steps);
  unsigned wanted = 0;
  for (int s = 0; s < steps; s++, step.order += step.count, step.number++) {
    const float learning_rate = learning_rates[s];  // asked for long before it is needed
    forward_backward<Net>(step, TRAIN, shared, block, NoTimer());
    if (!wait_for_grid(arrived, failed, wanted += gridDim.x)) return give_up(step);
    update<Net>(step, {step.parameters, velocity, nullptr, learning_rate, momentum, Net::Plan::WEIGHT_DECAY}, shared);
    if (!wait_for_grid(arrived, failed, wanted += gridDim.x)) return give_up(step);
  }
}
#endif

}  // namespace tuned

// The kernels of a network. All have blocks of Net::Threads::BLOCK threads, with Net::Plan::SHARED_BYTES of shared
// memory.
#define TUNED_STEP_PARAMETERS                                                                                   \
  const unsigned char *images, const unsigned char *labels, const int *order, float *parameters, float *traces, \
      float *partials, float *outputs, float *losses, float *stash, float mean, float deviation,                \
      const float *channels, int seed_low, int seed_high, int number, int count
#define TUNED_STEP_ARGUMENTS                                                                                          \
  images, labels, order, parameters, traces, partials, outputs, losses, stash, {mean, deviation, channels}, seed_low, \
      seed_high, number, count
#define TUNED_KERNEL(Net, name) ENTRY_POINT_BOUNDED(step, name, Net::Threads::BLOCK)
#define TUNED_SHARED(Net)                                      \
  SHARED_LARGE(Float4, float4s, Net::Plan::SHARED_BYTES / 16); \
  float* shared = reinterpret_cast<float*>(float4s)

// step_forward_backward: the first phase as a launch of its own, for a device without barriers of the grid and for all
//   that is no training. mode: one of tuned::Mode.
// step_time_sections: the first phase of a training step, timed: spent (sections,) is added to, in ticks of the first
//   block.
// step_update: the second phase. apply: whether the weights change; where they do not, the gradient is written.
// step_shuffle_images: shuffle.cuh.
#define TUNED_PHASES(Net)                                                                                         \
  TUNED_KERNEL(Net, forward_backward)(TUNED_STEP_PARAMETERS, int mode) {                                          \
    TUNED_SHARED(Net);                                                                                            \
    const tuned::Step step = {TUNED_STEP_ARGUMENTS};                                                              \
    tuned::Block<Net> block(step, shared, 1);                                                                     \
    tuned::forward_backward<Net>(step, mode, shared, block, tuned::NoTimer());                                    \
  }                                                                                                               \
  TUNED_KERNEL(Net, time_sections)(TUNED_STEP_PARAMETERS, unsigned long long* spent) {                            \
    TUNED_SHARED(Net);                                                                                            \
    const tuned::Step step = {TUNED_STEP_ARGUMENTS};                                                              \
    tuned::Block<Net> block(step, shared, 1);                                                                     \
    tuned::forward_backward<Net>(step, tuned::TRAIN, shared, block, tuned::SectionTimer{spent, 0});               \
  }                                                                                                               \
  TUNED_KERNEL(Net, update)(float* parameters, float* traces, float* partials, float* velocity, float* gradient,  \
                            const float* learning_rate, float momentum, int apply, int count) {                   \
    TUNED_SHARED(Net);                                                                                            \
    tuned::Step step = {};                                                                                        \
    step.traces = traces, step.partials = partials, step.count = count;                                           \
    const tuned::Update how = {parameters,     velocity, apply ? nullptr : gradient,                              \
                               *learning_rate, momentum, Net::Plan::WEIGHT_DECAY};                                \
    tuned::update<Net>(step, how, shared);                                                                        \
  }                                                                                                               \
  ENTRY_POINT(step, shuffle_images)(const unsigned short* __restrict__ tables, int* __restrict__ order, int half, \
                                    int count) {                                                                  \
    shuffle_images<Net::Plan::SHUFFLE_ROUNDS>(tables, order, half, count);                                        \
  }

// step_train where no barrier of the grid stands between the phases; for a batch of at most as many images as blocks.
//   handed (count TRACE + count PARTIALS + PARTIALS,): numbers whose stamps are none of stamp, stamp + 1, ...
//   `dense_tiles` and `failed` begin as 0, and `failed` ends as 1 when a block waited in vain.
#define TUNED_STAMPED_ENTRY_POINTS(Net)                                                                         \
  TUNED_PHASES(Net)                                                                                             \
  TUNED_KERNEL(Net, train)(TUNED_STEP_PARAMETERS, float* velocity, const float* learning_rates, float momentum, \
                           int steps, unsigned* dense_tiles, unsigned* failed, unsigned long long* handed,      \
                           int stamp) {                                                                         \
    TUNED_SHARED(Net);                                                                                          \
    tuned::Step step = {TUNED_STEP_ARGUMENTS};                                                                  \
    tuned::Stamped* sums = handed + static_cast<long long>(count) * Net::Plan::TRACE;                           \
    tuned::Stamped* weights = sums + static_cast<long long>(count) * Net::Plan::PARTIALS;                       \
    tuned::train_stamped<Net>(step, shared, velocity, learning_rates, momentum, steps,                          \
                              {handed, sums, weights, dense_tiles, failed}, static_cast<unsigned>(stamp),       \
                              tuned::NoTimer());                                                                \
  }

// step_train: `steps` whole steps in one launch. order (steps, count), learning_rates (steps,). All blocks must be
// resident;
//   `arrived` and `failed` begin as 0, and `failed` ends as 1 when they were not.
#ifdef __CUDACC__
#define TUNED_ENTRY_POINTS(Net)                                                                                 \
  TUNED_PHASES(Net)                                                                                             \
  TUNED_KERNEL(Net, train)(TUNED_STEP_PARAMETERS, float* velocity, const float* learning_rates, float momentum, \
                           int steps, unsigned* arrived, unsigned* failed) {                                    \
    TUNED_SHARED(Net);                                                                                          \
    tuned::Step step = {TUNED_STEP_ARGUMENTS};                                                                  \
    tuned::train<Net>(step, shared, velocity, learning_rates, momentum, steps, arrived, failed);                \
  }
#else
#define TUNED_ENTRY_POINTS(Net) TUNED_PHASES(Net)
#endif
