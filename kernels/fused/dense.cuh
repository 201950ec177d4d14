// Stage fused, fully connected layer: product, bias and activation in one kernel; the whole backward pass in another.
#pragma once
#include "../layers.cuh"
#include "../matmul.cuh"

namespace fused {

// source (count, INPUTS), target (count, UNITS), weight (UNITS, INPUTS).
template <class Layer>
struct Dense {
  static constexpr int INPUTS = Layer::INPUTS, UNITS = Layer::UNITS, FUNCTION = Layer::FUNCTION;
  static constexpr bool FIRST = Layer::FIRST;  // the network's first layer needs no source errors
  // Small tiles: a batch of 64 images and 120 units is little work, and only many blocks reach all of the GPU.
  using T = Tile<Layer::M_TILE, Layer::N_TILE, Layer::THREADS>;

  static constexpr int PARTIAL_SIZE = Layer::PARAMETERS;
  static_assert(PARTIAL_SIZE == UNITS * INPUTS + UNITS, "a partial sum has a gradient of each weight and each bias");

  // target = f(source x transposed weight + bias)
  static __device__ __forceinline__ void forward(const float* __restrict__ source, const float* __restrict__ weight,
                                                 const float* __restrict__ bias, float* __restrict__ target,
                                                 int count) {
    SHARED(float, tile_a, T::A_SIZE);
    SHARED(float, tile_b, T::B_SIZE);
    const int wide = ceil_div(UNITS, T::N), high = ceil_div(count, T::M);
    for (int tile = blockIdx.x; tile < wide * high; tile += gridDim.x)
      multiply_tile<T, true, true>(
          tile_a, tile_b, tile / wide * T::M, tile % wide * T::N, count, UNITS, 0, INPUTS,
          [&](int image, int input) { return source[image * INPUTS + input]; },
          [&](int input, int unit) { return weight[unit * INPUTS + input]; },
          [&](int image, int unit, float sum) { target[image * UNITS + unit] = activate<FUNCTION>(sum + bias[unit]); });
  }

  // partials (groups, PARTIAL_SIZE): weight gradient (UNITS, INPUTS) and bias gradient (UNITS,) in one product, since
  // the bias is the weight of an input that is always 1; each group sums over its slice of the images (split-K).
  // source_errors (count, INPUTS) in the same launch, by the blocks after those.
  static __device__ __forceinline__ void backward(const float* __restrict__ source, const float* __restrict__ weight,
                                                  const float* __restrict__ target,
                                                  const float* __restrict__ target_errors,
                                                  float* __restrict__ source_errors, float* __restrict__ partials,
                                                  int count, int groups) {
    SHARED(float, tile_a, T::A_SIZE);
    SHARED(float, tile_b, T::B_SIZE);
    const auto delta = [&](int image, int unit) {
      return target_errors[image * UNITS + unit] * slope<FUNCTION>(target[image * UNITS + unit]);
    };
    const int wide = ceil_div(INPUTS + 1, T::N), high = ceil_div(UNITS, T::M);
    const int error_wide = ceil_div(INPUTS, T::N), error_high = FIRST ? 0 : ceil_div(count, T::M);
    const int weight_jobs = wide * high * groups;
    for (int job = blockIdx.x; job < weight_jobs + error_wide * error_high; job += gridDim.x) {
      if (job < weight_jobs) {
        const int group = job / (wide * high), tile = job % (wide * high);
        float* partial = partials + group * PARTIAL_SIZE;
        multiply_tile<T, false, false>(
            tile_a, tile_b, tile / wide * T::M, tile % wide * T::N, UNITS, INPUTS + 1,
            slice_start(group, groups, count), slice_start(group + 1, groups, count),
            [&](int unit, int image) { return delta(image, unit); },
            [&](int image, int input) { return input < INPUTS ? source[image * INPUTS + input] : 1.0f; },
            [&](int unit, int input, float sum) {
              partial[input < INPUTS ? unit * INPUTS + input : UNITS * INPUTS + unit] = sum;
            });
      } else {
        const int tile = job - weight_jobs;
        multiply_tile<T, true, false>(
            tile_a, tile_b, tile / error_wide * T::M, tile % error_wide * T::N, count, INPUTS, 0, UNITS,
            [&](int image, int unit) { return delta(image, unit); },
            [&](int unit, int input) { return weight[unit * INPUTS + input]; },
            [&](int image, int input, float sum) { source_errors[image * INPUTS + input] = sum; });
      }
    }
  }
};

}  // namespace fused

#define FUSED_DENSE_KERNELS(layer)                                                                                \
  ENTRY_POINT(layer, forward)                                                                                     \
  (const float* __restrict__ source, const float* __restrict__ weight, const float* __restrict__ bias,            \
   float* __restrict__ target, int count) {                                                                       \
    fused::Dense<layer>::forward(source, weight, bias, target, count);                                            \
  }                                                                                                               \
  ENTRY_POINT(layer, backward)                                                                                    \
  (const float* __restrict__ source, const float* __restrict__ weight, const float* __restrict__ target,          \
   const float* __restrict__ target_errors, float* __restrict__ source_errors, float* __restrict__ partials,      \
   int count, int groups) {                                                                                       \
    fused::Dense<layer>::backward(source, weight, target, target_errors, source_errors, partials, count, groups); \
  }
