// Stage tuned: what the functions of all layers share.
//
// A layer is a template of three types: Layer, the generated struct of its sizes and places (constexpr ints, and a
// SharedBuffer for each of its arrays); Threads, how a block's threads are used (team.cuh); and how it splits operands
// for tensor cores (tensor.cuh). It has the functions of LayerDefaults; step.cuh calls them and says in which order.
#pragma once
#include "arithmetic.cuh"
#include "async.cuh"
#include "../dropout.cuh"
#include "layers.cuh"
#include "levels.cuh"
#include "team.cuh"

namespace tuned {

// An array in a block's shared memory, OFFSET floats from its beginning. Image `slot` of those that a block takes
// together has a part of its own, PITCH floats behind that of the image before; with SLOTS, images use so many parts in
// turn.
template <int OFFSET_, int PITCH_ = 0, int SLOTS_ = 0>
struct SharedBuffer {
  static constexpr int OFFSET = OFFSET_, PITCH = PITCH_, SLOTS = SLOTS_;
  static __device__ __forceinline__ float* all(float* shared) { return shared + OFFSET; }
  static __device__ __forceinline__ float* image(float* shared, int slot) {
    if constexpr (SLOTS > 0)
      return shared + OFFSET + slot % SLOTS * PITCH;
    else
      return shared + OFFSET + slot * PITCH;
  }
};

// In place of an array that a layer does not have.
struct NoBuffer {};
template <class Buffer>
constexpr bool exists = true;
template <>
inline constexpr bool exists<NoBuffer> = false;

// Section timers compile to nothing unless a step is profiled.
struct NoTimer {
  __device__ __forceinline__ void mark(int) {}
};

// The first block's first thread adds the time since its last mark to `spent[section]`.
struct SectionTimer {
  unsigned long long* spent;
  unsigned long long last;

  __device__ __forceinline__ void mark(int section) {
    if (blockIdx.x || threadIdx.x) return;
    const unsigned long long now = ticks();
    if (section >= 0) spent[section] += now - last;
    last = now;
  }
};

// What a block works on during the first phase of a step.
//
// Row_: how numbers are left for other blocks: float*, or StampedRow (stamps.cuh).
template <class Timer_, class Row_ = float*>
struct Context {
  using Timer = Timer_;
  using Row = Row_;
  float* shared;
  const float* parameters;
  Levels levels;                 // of the images
  BulkCopyBarrier& bulk_copies;  // of dense layers' weights
  Timer& timer;
  // The block takes `here` images together; their traces begin at `trace` and are `trace_stride` floats apart.
  Row trace;
  int trace_stride, here;
  // By what dropout's masks are drawn; the block's image number i is image first + i * gridDim.x of the batch.
  Moment moment;
  int first;
};

// A call for one image or, behind a dense layer, for all IMAGES that a block takes together.
template <int IMAGES, class Call>
__device__ __forceinline__ void for_images(int slot, Call call) {
  if constexpr (IMAGES == 0) {
    call(slot);
  } else {
    for (int image = 0; image < IMAGES; image++) call(image);
  }
}

// Every function of a layer, for those that have nothing to do in it. Functions for one image are called by all threads
// of a team, the others by all threads of a block; barriers stand between two calls.
struct LayerDefaults {
  // Sums of a gradient that threads keep in their registers from a block's first image to its last.
  struct Accumulators {};
  static __device__ __forceinline__ void clear(Accumulators&) {}
  // Floats of partial sums that a block leaves of the layer's gradient.
  static constexpr int PARTIALS = 0;

  // When a launch begins: tables that stay in shared memory.
  static __device__ __forceinline__ void prepare(float*) {}

  // Weights on their way into shared memory: a first group of copies, which convert_weights finds there...
  static constexpr bool COPIES = false;
  template <class Context>
  static __device__ __forceinline__ void copy_weights(Context&) {}
  template <class Context>
  static __device__ __forceinline__ void convert_weights(Context&) {}
  // ...or numbers i and so on of all partial sums' weights one by one, where they come stamped.
  static __device__ __forceinline__ void place_weight(float*, int, float) {}
  // ...and a second one, which arrives while images go through the layers before: so many bytes as a bulk copy, by the
  // threads for which begins_bulk_copies() holds; then by all threads.
  static constexpr bool STREAMS = false;
  static constexpr int BULK_BYTES = 0;
  // Whether the layer has nothing to copy, or all that it has can be copied by one warp: weights in bulk, and the bias.
  static constexpr bool ONE_WARP_COPIES = true;
  template <class Context>
  static __device__ __forceinline__ void copy_weights_by_warp(Context&) {}
  template <class Context>
  static __device__ __forceinline__ void copy_weights_in_bulk(Context&) {}
  template <class Context>
  static __device__ __forceinline__ void stream_weights(Context&) {}

  // When no image is left: the accumulators into shared memory, and after a barrier their sum into the block's partial
  // sums.
  template <class Context>
  static __device__ __forceinline__ void stage_gradient(Context&, const Accumulators&) {}
  template <class Context, class Row>
  static __device__ __forceinline__ void store_gradient(Context&, Row) {}

  // Second phase: the tiles of the gradient that blocks sum, one at a time.
  static constexpr int TILES = 0;
};

}  // namespace tuned
