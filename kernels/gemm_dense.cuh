// Stage gemm_cuda, fully connected layer: matrix products, one kernel per operation.
// Needs: INPUTS, UNITS. source (count, INPUTS), target (count, UNITS), weight (UNITS, INPUTS).
#include "matmul.cuh"

using T = Tile<UNITS>;

// target = source x transposed weight
ENTRY(multiply)
(const float* __restrict__ weight, const float* __restrict__ source, float* __restrict__ target,
 int count) {
  SHARED(float, tile_a, T::A_SIZE);
  SHARED(float, tile_b, T::B_SIZE);
  const int wide = (count + T::WIDTH - 1) / T::WIDTH, high = (UNITS + T::HEIGHT - 1) / T::HEIGHT;
  for (int tile = blockIdx.x; tile < wide * high; tile += gridDim.x)
    multiply_tile<T, true, true>(
        tile_a, tile_b, tile / wide * T::HEIGHT, tile % wide * T::WIDTH, UNITS, count, 0, INPUTS,
        [&](int unit, int input) { return weight[unit * INPUTS + input]; },
        [&](int input, int image) { return source[image * INPUTS + input]; },
        [&](int unit, int image, float sum) { target[image * UNITS + unit] = sum; });
}

ENTRY(add_bias)(const float* __restrict__ bias, float* __restrict__ target, int count) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count * UNITS;
       i += gridDim.x * blockDim.x)
    target[i] += bias[i % UNITS];
}

// bias_gradient[unit] = sum of errors over the images
ENTRY(sum_bias_gradient)
(const float* __restrict__ errors, float* __restrict__ bias_gradient, int count) {
  SHARED(float, scratch, 256);
  for (int unit = blockIdx.x; unit < UNITS; unit += gridDim.x) {
    float sum = 0.0f;
    for (int image = threadIdx.x; image < count; image += 256) sum += errors[image * UNITS + unit];
    sum = block_sum<256>(sum, scratch);
    if (threadIdx.x == 0) bias_gradient[unit] = sum;
    __syncthreads();
  }
}

// weight_gradient (UNITS, INPUTS) = transposed errors x source
ENTRY(multiply_weight_gradient)
(const float* __restrict__ errors, const float* __restrict__ source,
 float* __restrict__ weight_gradient, int count) {
  SHARED(float, tile_a, T::A_SIZE);
  SHARED(float, tile_b, T::B_SIZE);
  const int wide = (INPUTS + T::WIDTH - 1) / T::WIDTH, high = (UNITS + T::HEIGHT - 1) / T::HEIGHT;
  for (int tile = blockIdx.x; tile < wide * high; tile += gridDim.x)
    multiply_tile<T, false, false>(
        tile_a, tile_b, tile / wide * T::HEIGHT, tile % wide * T::WIDTH, UNITS, INPUTS, 0, count,
        [&](int unit, int image) { return errors[image * UNITS + unit]; },
        [&](int image, int input) { return source[image * INPUTS + input]; },
        [&](int unit, int input, float sum) { weight_gradient[unit * INPUTS + input] = sum; });
}

// source_errors (count, INPUTS) = errors (count, UNITS) x weight (UNITS, INPUTS)
ENTRY(multiply_errors)
(const float* __restrict__ weight, const float* __restrict__ errors,
 float* __restrict__ source_errors, int count) {
  using S = Tile<64>;
  SHARED(float, tile_a, S::A_SIZE);
  SHARED(float, tile_b, S::B_SIZE);
  const int wide = (INPUTS + S::WIDTH - 1) / S::WIDTH, high = (count + S::HEIGHT - 1) / S::HEIGHT;
  for (int tile = blockIdx.x; tile < wide * high; tile += gridDim.x)
    multiply_tile<S, true, false>(
        tile_a, tile_b, tile / wide * S::HEIGHT, tile % wide * S::WIDTH, count, INPUTS, 0, UNITS,
        [&](int image, int unit) { return errors[image * UNITS + unit]; },
        [&](int unit, int input) { return weight[unit * INPUTS + input]; },
        [&](int image, int input, float sum) { source_errors[image * INPUTS + input] = sum; });
}
