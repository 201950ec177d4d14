// Plan `graph` of stage tuned: the kernels of a layer with weights, and of the activation and subsampling behind it.
//
// Needs: THREADS, ARITHMETIC, FIRST (whether the source is the images); CHANNELS, HEIGHT, WIDTH, MAPS, KERNEL_ROWS,
// KERNEL_COLUMNS, STRIDE_*, PADDING_*, WINDOW_*, OUT_ROWS, OUT_COLUMNS, FUNCTION, METHOD; PARAMETERS, WEIGHT_OFFSET (of the
// weights in the vector of all parameters); and the sizes of the three products' tiles, which
// cnnlib/stages/tuned/graph/tiles.py chooses and explains: FORWARD_*, ERRORS_*, GRADIENT_*, BACKWARD_BYTES. FINDS_PEAK: each
// block looks for the largest error itself. LEAVES_PEAK: the layer before wants to know its largest error. DROPS: dropout
// comes last, with what Mask of kernels/dropout.cuh needs.
#pragma once
#include "gradient.cuh"

namespace graph {

// The bits of the largest absolute value among some of `values`, in all threads of the block. largest: one shared number.
__device__ __forceinline__ unsigned largest_of(unsigned* largest, const float* __restrict__ values, IndexRange range) {
  if (threadIdx.x == 0) *largest = 0;
  __syncthreads();
  unsigned own = 0;
  for (int i : range) own = max(own, bits_of_size(values[i]));
  atomicMax(largest, own);
  __syncthreads();
  return *largest;
}

// *peak becomes the bits of the largest absolute value of `errors`, if that is larger.
template <class Layer>
__device__ __forceinline__ void find_peak(const float* __restrict__ errors, unsigned* __restrict__ peak, int count) {
  SHARED(unsigned, largest, 1);
  wait_for_previous_kernel();
  let_next_kernel_start();
  const unsigned found = largest_of(largest, errors, grid_range(count * SumErrors<Layer>::SIZE));
  if (threadIdx.x == 0 && found > 0) atomicMax(peak, found);
}

// The first job of this block among those that follow `jobs` others.
__device__ __forceinline__ int first_job_after(int jobs) {
  const int blocks = gridDim.x, own = blockIdx.x;
  return (own + blocks - jobs % blocks) % blocks;
}

// What dropout multiplies errors with.
template <class Layer>
__host__ __device__ constexpr float dropout_scale() {
  if constexpr (Layer::DROPS)
    return Layer::SCALE;
  else
    return 1.0f;
}

// The factor of a layer's errors, in all threads of a block.
template <class Layer>
__device__ __forceinline__ float factor_of_errors(unsigned* largest, const float* __restrict__ errors,
                                                  const unsigned* __restrict__ peak, int count) {
  constexpr float SPREAD = power_above(dropout_scale<Layer>());
  unsigned bits = 0;
  if constexpr (Layer::ARITHMETIC == F16X3)
    bits = Layer::FINDS_PEAK ? largest_of(largest, errors, block_range(count * SumErrors<Layer>::SIZE)) : *peak;
  return peak_factor(bits) / SPREAD;
}

// Both products of the backward pass in one launch. The first blocks have jobs of the gradient, which are longer than those
// of the errors: the short ones fill up what is left at the end. A layer that sees the images sends no errors back.
template <class Layer>
__device__ __forceinline__ void backward(const SumErrors<Layer>& errors, const float* __restrict__ source,
                                         const float* __restrict__ weight, float* __restrict__ source_errors,
                                         unsigned* __restrict__ source_peak, float* __restrict__ sums,
                                         float* __restrict__ partials, unsigned* __restrict__ tickets,
                                         const unsigned* __restrict__ peak, int count, int groups) {
  SHARED_LARGE(char, memory, Layer::BACKWARD_BYTES);
  SHARED(unsigned, largest, 1);
  wait_for_previous_kernel();
  let_next_kernel_start();
  const float factor = factor_of_errors<Layer>(largest, errors.errors, peak, count);
  if constexpr (!Layer::FIRST) {
    static_assert(Errors<Layer>::BYTES <= Layer::BACKWARD_BYTES, "the launch asks for enough shared memory");
    Errors<Layer>::run(memory, errors, weight, source_errors, source_peak, partials, tickets, factor,
                       first_job_after(Gradient<Layer>::jobs(groups)), count);
  }
  static_assert(Gradient<Layer>::BYTES <= Layer::BACKWARD_BYTES, "the launch asks for enough shared memory");
  Gradient<Layer>::run(memory, errors, source, sums, factor, count, groups);
}

}  // namespace graph

#define TUNED_GRAPH_LAYER_KERNELS(layer)                                                                            \
  ENTRY_POINT_RESIDENT(layer, forward, layer::THREADS, 2)                                                           \
  (const float* __restrict__ source, const float* __restrict__ weight, const float* __restrict__ bias,              \
   float* __restrict__ target, unsigned char* __restrict__ winners, float* __restrict__ partials,                   \
   unsigned* __restrict__ tickets, unsigned* __restrict__ peak, int seed_low, int seed_high,                        \
   const int* __restrict__ moment, int count) {                                                                     \
    graph::Forward<layer>::run(source, weight, bias, target, winners, partials, tickets, peak, seed_low, seed_high, \
                               moment, count);                                                                      \
  }                                                                                                                 \
  ENTRY_POINT_BOUNDED(layer, find_peak, layer::THREADS)                                                             \
  (const float* __restrict__ errors, unsigned* __restrict__ peak, int count) {                                      \
    graph::find_peak<layer>(errors, peak, count);                                                                   \
  }                                                                                                                 \
  ENTRY_POINT_RESIDENT(layer, backward, layer::THREADS, 2)                                                          \
  (const float* __restrict__ errors, const float* __restrict__ target, const unsigned char* __restrict__ winners,   \
   const float* __restrict__ source, const float* __restrict__ weight, float* __restrict__ source_errors,           \
   unsigned* __restrict__ source_peak, float* __restrict__ sums, float* __restrict__ partials,                      \
   unsigned* __restrict__ tickets, const unsigned* __restrict__ peak, int count, int groups) {                      \
    graph::backward<layer>({errors, target, winners, count}, source, weight, source_errors, source_peak, sums,      \
                           partials, tickets, peak, count, groups);                                                 \
  }
