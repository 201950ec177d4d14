// Stage gemm_cuda, activation: a kernel forward and a kernel backward. Needs: SIZE, FUNCTION.
#include "layers.cuh"

ENTRY(activate)(const float* __restrict__ source, float* __restrict__ target, int count) {
  for (int i : grid_range(count * SIZE))
    target[i] = activate<FUNCTION>(source[i]);
}

ENTRY(activate_backward)
(const float* __restrict__ target, const float* __restrict__ target_errors,
 float* __restrict__ source_errors, int count) {
  for (int i : grid_range(count * SIZE))
    source_errors[i] = target_errors[i] * slope<FUNCTION>(target[i]);
}
