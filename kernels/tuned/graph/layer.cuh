// Plan `graph` of stage tuned: the kernels of a layer with weights, and of the activation and subsampling behind it.
//
// Needs: THREADS, ARITHMETIC, FIRST (whether the source is the images); CHANNELS, HEIGHT, WIDTH, MAPS, KERNEL_ROWS,
// KERNEL_COLUMNS, STRIDE_*, PADDING_*, WINDOW_*, OUT_ROWS, OUT_COLUMNS, FUNCTION, METHOD; PARAMETERS, WEIGHT_OFFSET (of the
// weights in the vector of all parameters); and the sizes of the three products' tiles, which
// cnnlib/stages/tuned/graph/tiles.py chooses and explains: FORWARD_*, ERRORS_*, GRADIENT_*.
#pragma once
#include "gradient.cuh"

namespace graph {

// *peak becomes the bits of the largest absolute value of `errors`, if that is larger. The order of atomics is not seen.
template <class Layer>
__device__ __forceinline__ void find_peak(const float* __restrict__ errors, unsigned* __restrict__ peak, int count) {
  SHARED(unsigned, largest, 1);
  if (threadIdx.x == 0) largest[0] = 0;
  __syncthreads();
  unsigned own = 0;
  for (int i : grid_range(count * Layer::MAPS * Layer::OUT_ROWS * Layer::OUT_COLUMNS))
    own = max(own, absolute_bits(errors[i]));
  atomicMax(&largest[0], own);
  __syncthreads();
  if (threadIdx.x == 0) atomicMax(peak, largest[0]);
}

// A layer that sees the images sends no errors back, and has no tiles for it.
template <class Layer>
__device__ __forceinline__ void send_errors(const SumErrors<Layer>& errors, const float* __restrict__ weight,
                                            float* __restrict__ source_errors, float* __restrict__ partials,
                                            unsigned* __restrict__ tickets, const unsigned* __restrict__ peak,
                                            int count) {
  if constexpr (!Layer::FIRST) Errors<Layer>::run(errors, weight, source_errors, partials, tickets, peak, count);
}

}  // namespace graph

#define TUNED_GRAPH_LAYER_KERNELS(layer)                                                                          \
  ENTRY_POINT_BOUNDED(layer, forward, layer::THREADS)                                                             \
  (const float* __restrict__ source, const float* __restrict__ weight, const float* __restrict__ bias,            \
   float* __restrict__ target, unsigned char* __restrict__ winners, float* __restrict__ partials,                 \
   unsigned* __restrict__ tickets, unsigned* __restrict__ peak, int count) {                                      \
    graph::Forward<layer>::run(source, weight, bias, target, winners, partials, tickets, peak, count);            \
  }                                                                                                               \
  ENTRY_POINT_BOUNDED(layer, find_peak, layer::THREADS)                                                           \
  (const float* __restrict__ errors, unsigned* __restrict__ peak, int count) {                                    \
    graph::find_peak<layer>(errors, peak, count);                                                                 \
  }                                                                                                               \
  ENTRY_POINT_BOUNDED(layer, sum_gradient, layer::THREADS)                                                        \
  (const float* __restrict__ errors, const float* __restrict__ target, const unsigned char* __restrict__ winners, \
   const float* __restrict__ source, float* __restrict__ partials, const unsigned* __restrict__ peak, int count,  \
   int groups) {                                                                                                  \
    graph::Gradient<layer>::run({errors, target, winners, count}, source, partials, peak, count, groups);         \
  }                                                                                                               \
  ENTRY_POINT_BOUNDED(layer, send_errors, layer::THREADS)                                                         \
  (const float* __restrict__ errors, const float* __restrict__ target, const unsigned char* __restrict__ winners, \
   const float* __restrict__ weight, float* __restrict__ source_errors, float* __restrict__ partials,             \
   unsigned* __restrict__ tickets, const unsigned* __restrict__ peak, int count) {                                \
    graph::send_errors<layer>({errors, target, winners, count}, weight, source_errors, partials, tickets, peak,   \
                              count);                                                                             \
  }
