// Stage gemm_cuda, fully connected layer: matrix products, one kernel per operation.
#pragma once
#include "../matmul.cuh"

namespace gemm {

// source (count, INPUTS), target (count, UNITS), weight (UNITS, INPUTS).
template <class Layer>
struct Dense {
  static constexpr int THREADS = Layer::THREADS;  // of every block
  static constexpr int INPUTS = Layer::INPUTS, UNITS = Layer::UNITS;
  static constexpr int SUM_THREADS = Layer::SUM_THREADS;         // that add the slices of one weight's gradient
  using UnitTile = Tile<Layer::M_TILE, Layer::N_TILE, THREADS>;  // of products with UNITS rows
  using ImageTile = Tile<Layer::DATA_M_TILE, Layer::DATA_N_TILE, THREADS>;  // of the product with a row an image

  static constexpr int SLICE_SIZE = Layer::PARAMETERS;
  static_assert(SLICE_SIZE == UNITS * INPUTS + UNITS, "a slice has a gradient of each weight and each bias");
  static_assert(32 * SUM_THREADS == THREADS, "a block of sum_slices has 32 neighbouring weights");

  // target = source x transposed weight
  static __device__ __forceinline__ void multiply(const float* __restrict__ weight, const float* __restrict__ source,
                                                  float* __restrict__ target, int count) {
    using T = UnitTile;
    SHARED(float, tile_a, T::A_SIZE);
    SHARED(float, tile_b, T::B_SIZE);
    const int wide = ceil_div(count, T::N), high = ceil_div(UNITS, T::M);
    for (int tile = blockIdx.x; tile < wide * high; tile += gridDim.x)
      multiply_tile<T, true, true>(
          tile_a, tile_b, tile / wide * T::M, tile % wide * T::N, UNITS, count, 0, INPUTS,
          [&](int unit, int input) { return weight[unit * INPUTS + input]; },
          [&](int input, int image) { return source[image * INPUTS + input]; },
          [&](int unit, int image, float sum) { target[image * UNITS + unit] = sum; });
  }

  static __device__ __forceinline__ void add_bias(const float* __restrict__ bias, float* __restrict__ target,
                                                  int count) {
    for (int i : grid_range(count * UNITS)) target[i] += bias[i % UNITS];
  }

  // slices (slice_count, SLICE_SIZE): the weight gradient (UNITS, INPUTS) = transposed errors x source, then the bias
  // gradient (UNITS,), each slice over its share of the images (split-K).
  static __device__ __forceinline__ void backward_weights(const float* __restrict__ errors,
                                                          const float* __restrict__ source, float* __restrict__ slices,
                                                          int count, int slice_count) {
    using T = UnitTile;
    SHARED(float, tile_a, T::A_SIZE);
    SHARED(float, tile_b, T::B_SIZE);
    const int wide = ceil_div(INPUTS, T::N), high = ceil_div(UNITS, T::M);
    for (int job = blockIdx.x; job < wide * high * slice_count; job += gridDim.x) {
      const int slice = job / (wide * high), tile = job % (wide * high);
      multiply_tile<T, false, false>(
          tile_a, tile_b, tile / wide * T::M, tile % wide * T::N, UNITS, INPUTS, slice_start(slice, slice_count, count),
          slice_start(slice + 1, slice_count, count), [&](int unit, int image) { return errors[image * UNITS + unit]; },
          [&](int image, int input) { return source[image * INPUTS + input]; },
          [&](int unit, int input, float sum) { slices[slice * SLICE_SIZE + unit * INPUTS + input] = sum; });
    }
  }

  // The slices of the bias gradient: one thread a unit and slice.
  static __device__ __forceinline__ void backward_bias(const float* __restrict__ errors, float* __restrict__ slices,
                                                       int count, int slice_count) {
    for (int i : grid_range(UNITS * slice_count)) {
      const int slice = i / UNITS, unit = i % UNITS;
      const int to = slice_start(slice + 1, slice_count, count);
      float sum = 0.0f;
      for (int image = slice_start(slice, slice_count, count); image < to; image++) sum += errors[image * UNITS + unit];
      slices[slice * SLICE_SIZE + UNITS * INPUTS + unit] = sum;
    }
  }

  // gradient: the weight and the bias gradient, which are neighbours in the flat vector
  static __device__ __forceinline__ void sum_slices(const float* __restrict__ slices, float* __restrict__ gradient,
                                                    int slice_count) {
    SHARED(float, scratch, THREADS);
    add_slices<SUM_THREADS>(scratch, slices, gradient, SLICE_SIZE, slice_count);
  }

  // source_errors (count, INPUTS) = errors (count, UNITS) x weight (UNITS, INPUTS)
  static __device__ __forceinline__ void backward_data(const float* __restrict__ weight,
                                                       const float* __restrict__ errors,
                                                       float* __restrict__ source_errors, int count) {
    using T = ImageTile;
    SHARED(float, tile_a, T::A_SIZE);
    SHARED(float, tile_b, T::B_SIZE);
    const int wide = ceil_div(INPUTS, T::N), high = ceil_div(count, T::M);
    for (int tile = blockIdx.x; tile < wide * high; tile += gridDim.x)
      multiply_tile<T, true, false>(
          tile_a, tile_b, tile / wide * T::M, tile % wide * T::N, count, INPUTS, 0, UNITS,
          [&](int image, int unit) { return errors[image * UNITS + unit]; },
          [&](int unit, int input) { return weight[unit * INPUTS + input]; },
          [&](int image, int input, float sum) { source_errors[image * INPUTS + input] = sum; });
  }
};

}  // namespace gemm

#define GEMM_DENSE_KERNELS(layer)                                                                                      \
  ENTRY_POINT(layer, multiply)                                                                                         \
  (const float* __restrict__ weight, const float* __restrict__ source, float* __restrict__ target, int count) {        \
    gemm::Dense<layer>::multiply(weight, source, target, count);                                                       \
  }                                                                                                                    \
  ENTRY_POINT(layer, add_bias)(const float* __restrict__ bias, float* __restrict__ target, int count) {                \
    gemm::Dense<layer>::add_bias(bias, target, count);                                                                 \
  }                                                                                                                    \
  ENTRY_POINT(layer, multiply_weight_gradient)                                                                         \
  (const float* __restrict__ errors, const float* __restrict__ source, float* __restrict__ slices, int count,          \
   int slice_count) {                                                                                                  \
    gemm::Dense<layer>::backward_weights(errors, source, slices, count, slice_count);                                  \
  }                                                                                                                    \
  ENTRY_POINT(layer, sum_bias_gradient)                                                                                \
  (const float* __restrict__ errors, float* __restrict__ slices, int count, int slice_count) {                         \
    gemm::Dense<layer>::backward_bias(errors, slices, count, slice_count);                                             \
  }                                                                                                                    \
  ENTRY_POINT(layer, sum_slices)(const float* __restrict__ slices, float* __restrict__ gradient, int slice_count) {    \
    gemm::Dense<layer>::sum_slices(slices, gradient, slice_count);                                                     \
  }                                                                                                                    \
  ENTRY_POINT(layer, multiply_errors)                                                                                  \
  (const float* __restrict__ weight, const float* __restrict__ errors, float* __restrict__ source_errors, int count) { \
    gemm::Dense<layer>::backward_data(weight, errors, source_errors, count);                                           \
  }
