// Stage gemm_cuda, activation: one kernel forward and one backward.
#pragma once
#include "../layers.cuh"

namespace gemm {

// source, target and their errors: (count, SIZE).
template <class Layer>
struct Activation {
  static constexpr int SIZE = Layer::SIZE, FUNCTION = Layer::FUNCTION;

  static __device__ __forceinline__ void forward(const float* __restrict__ source, float* __restrict__ target,
                                                 int count) {
    for (int i : grid_range(count * SIZE)) target[i] = activate<FUNCTION>(source[i]);
  }

  // The compiler drops the loads of the source or the target where the function's derivative does not read it.
  static __device__ __forceinline__ void backward(const float* __restrict__ source, const float* __restrict__ target,
                                                  const float* __restrict__ target_errors,
                                                  float* __restrict__ source_errors, int count) {
    for (int i : grid_range(count * SIZE)) source_errors[i] = target_errors[i] * slope<FUNCTION>(source[i], target[i]);
  }
};

}  // namespace gemm

#define GEMM_ACTIVATION_KERNELS(layer)                                                                          \
  ENTRY_POINT(layer, activate)(const float* __restrict__ source, float* __restrict__ target, int count) {       \
    gemm::Activation<layer>::forward(source, target, count);                                                    \
  }                                                                                                             \
  ENTRY_POINT(layer, activate_backward)                                                                         \
  (const float* __restrict__ source, const float* __restrict__ target, const float* __restrict__ target_errors, \
   float* __restrict__ source_errors, int count) {                                                              \
    gemm::Activation<layer>::backward(source, target, target_errors, source_errors, count);                     \
  }
