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
  for (int i : grid_range(count * UNITS)) target[i] += bias[i % UNITS];
}

// slices (slice_count, SLICE_SIZE): weight gradient (UNITS, INPUTS), then bias gradient (UNITS,), each slice over
// its share of the images.
constexpr int SLICE_SIZE = UNITS * INPUTS + UNITS;

// weight gradient = transposed errors x source
ENTRY(multiply_weight_gradient)
(const float* __restrict__ errors, const float* __restrict__ source, float* __restrict__ slices,
 int count, int slice_count) {
  SHARED(float, tile_a, T::A_SIZE);
  SHARED(float, tile_b, T::B_SIZE);
  const int wide = (INPUTS + T::WIDTH - 1) / T::WIDTH, high = (UNITS + T::HEIGHT - 1) / T::HEIGHT;
  for (int job = blockIdx.x; job < wide * high * slice_count; job += gridDim.x) {
    const int slice = job / (wide * high), tile = job % (wide * high);
    multiply_tile<T, false, false>(
        tile_a, tile_b, tile / wide * T::HEIGHT, tile % wide * T::WIDTH, UNITS, INPUTS,
        slice_start(slice, slice_count, count), slice_start(slice + 1, slice_count, count),
        [&](int unit, int image) { return errors[image * UNITS + unit]; },
        [&](int image, int input) { return source[image * INPUTS + input]; },
        [&](int unit, int input, float sum) {
          slices[slice * SLICE_SIZE + unit * INPUTS + input] = sum;
        });
  }
}

// one thread a unit and slice
ENTRY(sum_bias_gradient)
(const float* __restrict__ errors, float* __restrict__ slices, int count, int slice_count) {
  for (int i : grid_range(UNITS * slice_count)) {
    const int slice = i / UNITS, unit = i % UNITS;
    const int to = slice_start(slice + 1, slice_count, count);
    float sum = 0.0f;
    for (int image = slice_start(slice, slice_count, count); image < to; image++)
      sum += errors[image * UNITS + unit];
    slices[slice * SLICE_SIZE + UNITS * INPUTS + unit] = sum;
  }
}

// gradient: weight and bias gradient, which are neighbours in the flat vector
ENTRY(sum_slices)
(const float* __restrict__ slices, float* __restrict__ gradient, int slice_count) {
  SHARED(float, scratch, 256);
  add_slices(scratch, slices, gradient, SLICE_SIZE, slice_count);
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
