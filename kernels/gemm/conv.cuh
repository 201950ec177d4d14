// Stage gemm_cuda, convolution: im2col and a matrix product (Chellapilla, Puri and Simard, "High Performance
// Convolutional Neural Networks for Document Processing", 2006), one kernel per operation.
//
// Maps lie as (image, channel, row, column). A target position of the whole batch is numbered
// position = image * AREA + row * COLUMNS + column; a weight of one map term = (channel, i, j). Padding is nowhere in
// memory: im2col writes zeros for it, and col2im asks for no errors of it.
#pragma once
#include "../matmul.cuh"

namespace gemm {

template <class Layer>
struct Conv {
  static constexpr int THREADS = Layer::THREADS;                                                  // of every block
  static constexpr int CHANNELS = Layer::CHANNELS, HEIGHT = Layer::HEIGHT, WIDTH = Layer::WIDTH;  // source
  static constexpr int MAPS = Layer::MAPS, ROWS = Layer::ROWS, COLUMNS = Layer::COLUMNS;          // target
  static constexpr int KERNEL_ROWS = Layer::KERNEL_ROWS, KERNEL_COLUMNS = Layer::KERNEL_COLUMNS;
  static constexpr int ROW_STRIDE = Layer::ROW_STRIDE, COLUMN_STRIDE = Layer::COLUMN_STRIDE;
  static constexpr int ROW_PADDING = Layer::ROW_PADDING, COLUMN_PADDING = Layer::COLUMN_PADDING;
  static constexpr int SUM_THREADS = Layer::SUM_THREADS;        // that add the slices of one weight's gradient
  using MapTile = Tile<Layer::M_TILE, Layer::N_TILE, THREADS>;  // of products with MAPS rows
  using TermTile = Tile<Layer::DATA_M_TILE, Layer::DATA_N_TILE, THREADS>;  // of the product with TERMS rows

  static constexpr int AREA = ROWS * COLUMNS;
  static constexpr int KERNEL_AREA = KERNEL_ROWS * KERNEL_COLUMNS, TERMS = CHANNELS * KERNEL_AREA;
  static constexpr int SLICE_SIZE = Layer::PARAMETERS;
  static_assert(SLICE_SIZE == MAPS * TERMS + MAPS, "a slice has a gradient of each weight and each bias");
  static_assert(32 * SUM_THREADS == THREADS, "a block of sum_slices has 32 neighbouring weights");

  // columns (TERMS, count * AREA) = the source value that each term sees at each position
  static __device__ __forceinline__ void im2col(const float* __restrict__ source, float* __restrict__ columns,
                                                int count) {
    const int positions = count * AREA, total = positions * TERMS;
    for (int i : grid_range(total)) {
      const int term = i / positions, position = i % positions;
      const int image = position / AREA, y = position % AREA / COLUMNS, x = position % COLUMNS;
      const int channel = term / KERNEL_AREA, a = term / KERNEL_COLUMNS % KERNEL_ROWS, b = term % KERNEL_COLUMNS;
      const int row = y * ROW_STRIDE + a - ROW_PADDING, column = x * COLUMN_STRIDE + b - COLUMN_PADDING;
      const bool inside =
          (ROW_PADDING == 0 || (row >= 0 && row < HEIGHT)) && (COLUMN_PADDING == 0 || (column >= 0 && column < WIDTH));
      columns[i] = inside ? source[((image * CHANNELS + channel) * HEIGHT + row) * WIDTH + column] : 0.0f;
    }
  }

  // target (count, MAPS, AREA) = weight (MAPS, TERMS) x columns (TERMS, count * AREA)
  static __device__ __forceinline__ void multiply(const float* __restrict__ weight, const float* __restrict__ columns,
                                                  float* __restrict__ target, int count) {
    using T = MapTile;
    SHARED(float, tile_a, T::A_SIZE);
    SHARED(float, tile_b, T::B_SIZE);
    const int positions = count * AREA;
    const int wide = ceil_div(positions, T::N), high = ceil_div(MAPS, T::M);
    for (int tile = blockIdx.x; tile < wide * high; tile += gridDim.x)
      multiply_tile<T, true, false>(
          tile_a, tile_b, tile / wide * T::M, tile % wide * T::N, MAPS, positions, 0, TERMS,
          [&](int map, int term) { return weight[map * TERMS + term]; },
          [&](int term, int position) { return columns[term * positions + position]; },
          [&](int map, int position, float sum) {
            target[(position / AREA * MAPS + map) * AREA + position % AREA] = sum;
          });
  }

  // target[image, map, :] += bias[map]
  static __device__ __forceinline__ void add_bias(const float* __restrict__ bias, float* __restrict__ target,
                                                  int count) {
    const int total = count * MAPS * AREA;
    for (int i : grid_range(total)) target[i] += bias[i / AREA % MAPS];
  }

  // slices (slice_count, SLICE_SIZE): the weight gradient (MAPS, TERMS) = errors x transposed columns, then the bias
  // gradient (MAPS,). The sum over all positions is cut into slices (split-K) so that more than a handful of blocks
  // have work.
  static __device__ __forceinline__ void backward_weights(const float* __restrict__ errors,
                                                          const float* __restrict__ columns, float* __restrict__ slices,
                                                          int count, int slice_count) {
    using T = MapTile;
    SHARED(float, tile_a, T::A_SIZE);
    SHARED(float, tile_b, T::B_SIZE);
    const int positions = count * AREA;
    const int wide = ceil_div(TERMS, T::N), high = ceil_div(MAPS, T::M);
    for (int job = blockIdx.x; job < wide * high * slice_count; job += gridDim.x) {
      const int slice = job / (wide * high), tile = job % (wide * high);
      multiply_tile<T, true, true>(
          tile_a, tile_b, tile / wide * T::M, tile % wide * T::N, MAPS, TERMS,
          slice_start(slice, slice_count, positions), slice_start(slice + 1, slice_count, positions),
          [&](int map, int position) { return errors[(position / AREA * MAPS + map) * AREA + position % AREA]; },
          [&](int position, int term) { return columns[term * positions + position]; },
          [&](int map, int term, float sum) { slices[slice * SLICE_SIZE + map * TERMS + term] = sum; });
    }
  }

  // The slices of the bias gradient: one block a map and slice.
  static __device__ __forceinline__ void backward_bias(const float* __restrict__ errors, float* __restrict__ slices,
                                                       int count, int slice_count) {
    SHARED(float, scratch, THREADS);
    const int positions = count * AREA;
    for (int job = blockIdx.x; job < MAPS * slice_count; job += gridDim.x) {
      const int slice = job / MAPS, map = job % MAPS;
      const int to = slice_start(slice + 1, slice_count, positions);
      float sum = 0.0f;
      for (int i = slice_start(slice, slice_count, positions) + threadIdx.x; i < to; i += THREADS)
        sum += errors[(i / AREA * MAPS + map) * AREA + i % AREA];
      sum = block_sum<THREADS>(sum, scratch);
      if (threadIdx.x == 0) slices[slice * SLICE_SIZE + MAPS * TERMS + map] = sum;
      __syncthreads();
    }
  }

  // gradient: the weight and the bias gradient, which are neighbours in the flat vector
  static __device__ __forceinline__ void sum_slices(const float* __restrict__ slices, float* __restrict__ gradient,
                                                    int slice_count) {
    SHARED(float, scratch, THREADS);
    add_slices<SUM_THREADS>(scratch, slices, gradient, SLICE_SIZE, slice_count);
  }

  // column_errors (TERMS, count * AREA) = transposed weight (TERMS, MAPS) x errors (MAPS, count * AREA)
  static __device__ __forceinline__ void backward_data(const float* __restrict__ weight,
                                                       const float* __restrict__ errors,
                                                       float* __restrict__ column_errors, int count) {
    using T = TermTile;
    SHARED(float, tile_a, T::A_SIZE);
    SHARED(float, tile_b, T::B_SIZE);
    const int positions = count * AREA;
    const int wide = ceil_div(positions, T::N), high = ceil_div(TERMS, T::M);
    for (int tile = blockIdx.x; tile < wide * high; tile += gridDim.x)
      multiply_tile<T, false, false>(
          tile_a, tile_b, tile / wide * T::M, tile % wide * T::N, TERMS, positions, 0, MAPS,
          [&](int term, int map) { return weight[map * TERMS + term]; },
          [&](int map, int position) { return errors[(position / AREA * MAPS + map) * AREA + position % AREA]; },
          [&](int term, int position, float sum) { column_errors[term * positions + position] = sum; });
  }

  // source_errors (count, CHANNELS, HEIGHT, WIDTH): each source unit gathers (pulls) from the windows it was in
  static __device__ __forceinline__ void col2im(const float* __restrict__ column_errors,
                                                float* __restrict__ source_errors, int count) {
    const int positions = count * AREA, total = count * CHANNELS * HEIGHT * WIDTH;
    for (int i : grid_range(total)) {
      const int x = i % WIDTH, y = i / WIDTH % HEIGHT, channel = i / (WIDTH * HEIGHT) % CHANNELS;
      const int image = i / (WIDTH * HEIGHT * CHANNELS);
      float sum = 0.0f;
      for (int a = 0; a < KERNEL_ROWS; a++)
        for (int b = 0; b < KERNEL_COLUMNS; b++) {
          // upper left corner of the window, in the padded source
          const int row = y + ROW_PADDING - a, column = x + COLUMN_PADDING - b;
          if (row < 0 || column < 0 || row % ROW_STRIDE || column % COLUMN_STRIDE) continue;
          if (row / ROW_STRIDE >= ROWS || column / COLUMN_STRIDE >= COLUMNS) continue;
          const int term = (channel * KERNEL_ROWS + a) * KERNEL_COLUMNS + b;
          sum += column_errors[term * positions + image * AREA + row / ROW_STRIDE * COLUMNS + column / COLUMN_STRIDE];
        }
      source_errors[i] = sum;
    }
  }
};

}  // namespace gemm

#define GEMM_CONV_KERNELS(layer)                                                                                       \
  ENTRY_POINT(layer, im2col)(const float* __restrict__ source, float* __restrict__ columns, int count) {               \
    gemm::Conv<layer>::im2col(source, columns, count);                                                                 \
  }                                                                                                                    \
  ENTRY_POINT(layer, multiply)                                                                                         \
  (const float* __restrict__ weight, const float* __restrict__ columns, float* __restrict__ target, int count) {       \
    gemm::Conv<layer>::multiply(weight, columns, target, count);                                                       \
  }                                                                                                                    \
  ENTRY_POINT(layer, add_bias)(const float* __restrict__ bias, float* __restrict__ target, int count) {                \
    gemm::Conv<layer>::add_bias(bias, target, count);                                                                  \
  }                                                                                                                    \
  ENTRY_POINT(layer, multiply_weight_gradient)                                                                         \
  (const float* __restrict__ errors, const float* __restrict__ columns, float* __restrict__ slices, int count,         \
   int slice_count) {                                                                                                  \
    gemm::Conv<layer>::backward_weights(errors, columns, slices, count, slice_count);                                  \
  }                                                                                                                    \
  ENTRY_POINT(layer, sum_bias_gradient)                                                                                \
  (const float* __restrict__ errors, float* __restrict__ slices, int count, int slice_count) {                         \
    gemm::Conv<layer>::backward_bias(errors, slices, count, slice_count);                                              \
  }                                                                                                                    \
  ENTRY_POINT(layer, sum_slices)(const float* __restrict__ slices, float* __restrict__ gradient, int slice_count) {    \
    gemm::Conv<layer>::sum_slices(slices, gradient, slice_count);                                                      \
  }                                                                                                                    \
  ENTRY_POINT(layer, multiply_errors)                                                                                  \
  (const float* __restrict__ weight, const float* __restrict__ errors, float* __restrict__ column_errors, int count) { \
    gemm::Conv<layer>::backward_data(weight, errors, column_errors, count);                                            \
  }                                                                                                                    \
  ENTRY_POINT(layer, col2im)(const float* __restrict__ column_errors, float* __restrict__ source_errors, int count) {  \
    gemm::Conv<layer>::col2im(column_errors, source_errors, count);                                                    \
  }
