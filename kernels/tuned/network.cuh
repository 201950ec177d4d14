// The layers of a network in their order, as the generated unit lists them.
#pragma once
#include <type_traits>

#include "dense.cuh"
#include "reduce.cuh"
#include "stamps.cuh"
#include "step_inputs.cuh"

namespace tuned {

// Sections of the first phase in a profile. Behind LAYERS come those of the layers, forward and then backward.
enum Section { INPUT, LOSS, LEAVE, LAYERS };

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

  // Weights on their way into shared memory. What dense layers need arrives while convolutions work.
  template <class Context>
  static __device__ __forceinline__ void load_weights(Context& c) {
    (Single::copy_weights(c), ...);
    end_group_of_copies();
    copy_dense_weights(c);
  }
  // What convolutions need of them is waited for.
  template <class Context>
  static __device__ __forceinline__ void convert_weights(Context& c) {
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

  // A step asks for its weights first, and takes them when it needs them: behind a barrier of the grid all of them lie in
  // device memory...
  template <class Context>
  static __device__ __forceinline__ void ask_for_weights(Context& c, BehindBarriers&) {
    load_weights(c);
  }
  template <class Context>
  static __device__ __forceinline__ void take_weights(Context& c, BehindBarriers&) {
    convert_weights(c);
  }
  // ...and with stamps, after the first step of a launch, they come from blocks that may not be done with them.
  template <class Context>
  static __device__ __forceinline__ void ask_for_weights(Context& c, ByStamps& exchange) {
    if (!exchange.done) return load_weights(c);
    if constexpr (BATCH_TILES > 0) {
      c.bulk_copies.pending = true;
      if (threadIdx.x < 32) begin_dense_copies(c, exchange, false);
    }
  }
  template <class Context>
  static __device__ __forceinline__ void take_weights(Context& c, ByStamps& exchange) {
    if (!exchange.done) return convert_weights(c);
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
    reduce_partials<Threads, Plan::PARTIALS, TRACE, Plan::IMAGES == 1>(gradients, sizes.first_partial + first,
                                                                       min(PARTIALS_TILE, sizes.parameters - first),
                                                                       shared, update.from(sizes.first_weight + first));
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

}  // namespace tuned
