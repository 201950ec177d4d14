// Stage fused: fully connected layer + bias + activation. Needs: INPUTS, UNITS, FUNCTION, FIRST.
// source (count, INPUTS), target (count, UNITS), weight (UNITS, INPUTS).
#include "layers.cuh"
#include "matmul.cuh"

// Small tiles: a batch of 64 images and 120 units is little work, and only many blocks reach all of the GPU.
using T = Tile<16>;

// target = f(source x transposed weight + bias)
ENTRY(forward)
(const float* __restrict__ source, const float* __restrict__ weight, const float* __restrict__ bias,
 float* __restrict__ target, int count) {
  SHARED(float, tile_a, T::A_SIZE);
  SHARED(float, tile_b, T::B_SIZE);
  const int wide = (UNITS + T::WIDTH - 1) / T::WIDTH, high = (count + T::HEIGHT - 1) / T::HEIGHT;
  for (int tile = blockIdx.x; tile < wide * high; tile += gridDim.x)
    multiply_tile<T, true, true>(
        tile_a, tile_b, tile / wide * T::HEIGHT, tile % wide * T::WIDTH, count, UNITS, 0, INPUTS,
        [&](int image, int input) { return source[image * INPUTS + input]; },
        [&](int input, int unit) { return weight[unit * INPUTS + input]; },
        [&](int image, int unit, float sum) {
          target[image * UNITS + unit] = activate<FUNCTION>(sum + bias[unit]);
        });
}

// partials (groups, UNITS * INPUTS + UNITS): weight gradient (UNITS, INPUTS) and bias gradient (UNITS,) in one
// product, since the bias is the weight of an input that is always 1; each group sums over its slice of the images.
// source_errors (count, INPUTS) in the same launch, by the blocks after those.
ENTRY(backward)
(const float* __restrict__ source, const float* __restrict__ weight,
 const float* __restrict__ target, const float* __restrict__ target_errors,
 float* __restrict__ source_errors, float* __restrict__ partials, int count, int groups) {
  SHARED(float, tile_a, T::A_SIZE);
  SHARED(float, tile_b, T::B_SIZE);
  const auto delta = [&](int image, int unit) {
    return target_errors[image * UNITS + unit] * slope<FUNCTION>(target[image * UNITS + unit]);
  };
  const int wide = (INPUTS + 1 + T::WIDTH - 1) / T::WIDTH;
  const int high = (UNITS + T::HEIGHT - 1) / T::HEIGHT;
  const int error_wide = (INPUTS + T::WIDTH - 1) / T::WIDTH;
  const int error_high = FIRST ? 0 : (count + T::HEIGHT - 1) / T::HEIGHT;
  const int weight_jobs = wide * high * groups;
  for (int job = blockIdx.x; job < weight_jobs + error_wide * error_high; job += gridDim.x) {
    if (job < weight_jobs) {
      const int group = job / (wide * high), tile = job % (wide * high);
      float* partial = partials + group * (UNITS * INPUTS + UNITS);
      multiply_tile<T, false, false>(
          tile_a, tile_b, tile / wide * T::HEIGHT, tile % wide * T::WIDTH, UNITS, INPUTS + 1,
          slice_start(group, groups, count), slice_start(group + 1, groups, count),
          [&](int unit, int image) { return delta(image, unit); },
          [&](int image, int input) {
            return input < INPUTS ? source[image * INPUTS + input] : 1.0f;
          },
          [&](int unit, int input, float sum) {
            partial[input < INPUTS ? unit * INPUTS + input : UNITS * INPUTS + unit] = sum;
          });
    } else {
      const int place = job - weight_jobs;
      multiply_tile<T, true, false>(
          tile_a, tile_b, place / error_wide * T::HEIGHT, place % error_wide * T::WIDTH, count,
          INPUTS, 0, UNITS, [&](int image, int unit) { return delta(image, unit); },
          [&](int unit, int input) { return weight[unit * INPUTS + input]; },
          [&](int image, int input, float sum) { source_errors[image * INPUTS + input] = sum; });
    }
  }
}
