// Stage gemm_cuda, convolution: im2col and a matrix product, one kernel per operation.
// Needs: CHANNELS, HEIGHT, WIDTH (source), MAPS, KERNEL, STRIDE, ROWS, COLUMNS (target).
// Maps lie as (image, channel, row, column). A target position of the whole batch is numbered
// position = image * AREA + row * COLUMNS + column; a weight of one map term = (channel, i, j).
#include "matmul.cuh"

constexpr int AREA = ROWS * COLUMNS;
constexpr int TERMS = CHANNELS * KERNEL * KERNEL;

// columns (TERMS, count * AREA) = the source value that each term sees at each position
ENTRY(im2col)
(const float* __restrict__ source, float* __restrict__ columns, int count) {
  const int positions = count * AREA, total = positions * TERMS;
  for (int i : grid_range(total)) {
    const int term = i / positions, position = i % positions;
    const int image = position / AREA, y = position % AREA / COLUMNS, x = position % COLUMNS;
    const int channel = term / (KERNEL * KERNEL), a = term / KERNEL % KERNEL, b = term % KERNEL;
    columns[i] = source[((image * CHANNELS + channel) * HEIGHT + y * STRIDE + a) * WIDTH +
                        x * STRIDE + b];
  }
}

// target (count, MAPS, AREA) = weight (MAPS, TERMS) x columns (TERMS, count * AREA)
ENTRY(multiply)
(const float* __restrict__ weight, const float* __restrict__ columns, float* __restrict__ target,
 int count) {
  using T = Tile<MAPS>;
  SHARED(float, tile_a, T::A_SIZE);
  SHARED(float, tile_b, T::B_SIZE);
  const int positions = count * AREA;
  const int wide = (positions + T::WIDTH - 1) / T::WIDTH, high = (MAPS + T::HEIGHT - 1) / T::HEIGHT;
  for (int tile = blockIdx.x; tile < wide * high; tile += gridDim.x)
    multiply_tile<T, true, false>(
        tile_a, tile_b, tile / wide * T::HEIGHT, tile % wide * T::WIDTH, MAPS, positions, 0, TERMS,
        [&](int map, int term) { return weight[map * TERMS + term]; },
        [&](int term, int position) { return columns[term * positions + position]; },
        [&](int map, int position, float sum) {
          target[(position / AREA * MAPS + map) * AREA + position % AREA] = sum;
        });
}

// target[image, map, :] += bias[map]
ENTRY(add_bias)(const float* __restrict__ bias, float* __restrict__ target, int count) {
  const int total = count * MAPS * AREA;
  for (int i : grid_range(total))
    target[i] += bias[i / AREA % MAPS];
}

// slices (slice_count, SLICE_SIZE): weight gradient (MAPS, TERMS), then bias gradient (MAPS,). The sum over all
// positions is cut into slices so that the GPU has work for more than a handful of blocks.
constexpr int SLICE_SIZE = MAPS * TERMS + MAPS;

ENTRY(multiply_weight_gradient)
(const float* __restrict__ errors, const float* __restrict__ columns, float* __restrict__ slices,
 int count, int slice_count) {
  using T = Tile<MAPS>;
  SHARED(float, tile_a, T::A_SIZE);
  SHARED(float, tile_b, T::B_SIZE);
  const int positions = count * AREA;
  const int wide = (TERMS + T::WIDTH - 1) / T::WIDTH, high = (MAPS + T::HEIGHT - 1) / T::HEIGHT;
  for (int job = blockIdx.x; job < wide * high * slice_count; job += gridDim.x) {
    const int slice = job / (wide * high), tile = job % (wide * high);
    multiply_tile<T, true, true>(
        tile_a, tile_b, tile / wide * T::HEIGHT, tile % wide * T::WIDTH, MAPS, TERMS,
        slice_start(slice, slice_count, positions), slice_start(slice + 1, slice_count, positions),
        [&](int map, int position) {
          return errors[(position / AREA * MAPS + map) * AREA + position % AREA];
        },
        [&](int position, int term) { return columns[term * positions + position]; },
        [&](int map, int term, float sum) { slices[slice * SLICE_SIZE + map * TERMS + term] = sum; });
  }
}

// one block a map and slice
ENTRY(sum_bias_gradient)
(const float* __restrict__ errors, float* __restrict__ slices, int count, int slice_count) {
  SHARED(float, scratch, 256);
  const int positions = count * AREA;
  for (int job = blockIdx.x; job < MAPS * slice_count; job += gridDim.x) {
    const int slice = job / MAPS, map = job % MAPS;
    const int to = slice_start(slice + 1, slice_count, positions);
    float sum = 0.0f;
    for (int i = slice_start(slice, slice_count, positions) + threadIdx.x; i < to; i += 256)
      sum += errors[(i / AREA * MAPS + map) * AREA + i % AREA];
    sum = block_sum<256>(sum, scratch);
    if (threadIdx.x == 0) slices[slice * SLICE_SIZE + MAPS * TERMS + map] = sum;
    __syncthreads();
  }
}

// gradient: weight and bias gradient, which are neighbours in the flat vector
ENTRY(sum_slices)
(const float* __restrict__ slices, float* __restrict__ gradient, int slice_count) {
  SHARED(float, scratch, 256);
  add_slices(scratch, slices, gradient, SLICE_SIZE, slice_count);
}

// column_errors (TERMS, count * AREA) = transposed weight (TERMS, MAPS) x errors (MAPS, count * AREA)
ENTRY(multiply_errors)
(const float* __restrict__ weight, const float* __restrict__ errors,
 float* __restrict__ column_errors, int count) {
  using T = Tile<TERMS>;
  SHARED(float, tile_a, T::A_SIZE);
  SHARED(float, tile_b, T::B_SIZE);
  const int positions = count * AREA;
  const int wide = (positions + T::WIDTH - 1) / T::WIDTH;
  const int high = (TERMS + T::HEIGHT - 1) / T::HEIGHT;
  for (int tile = blockIdx.x; tile < wide * high; tile += gridDim.x)
    multiply_tile<T, false, false>(
        tile_a, tile_b, tile / wide * T::HEIGHT, tile % wide * T::WIDTH, TERMS, positions, 0, MAPS,
        [&](int term, int map) { return weight[map * TERMS + term]; },
        [&](int map, int position) {
          return errors[(position / AREA * MAPS + map) * AREA + position % AREA];
        },
        [&](int term, int position, float sum) { column_errors[term * positions + position] = sum; });
}

// source_errors (count, CHANNELS, HEIGHT, WIDTH): each source unit gathers (pulls) from the windows it was in
ENTRY(col2im)
(const float* __restrict__ column_errors, float* __restrict__ source_errors, int count) {
  const int positions = count * AREA, total = count * CHANNELS * HEIGHT * WIDTH;
  for (int i : grid_range(total)) {
    const int x = i % WIDTH, y = i / WIDTH % HEIGHT, channel = i / (WIDTH * HEIGHT) % CHANNELS;
    const int image = i / (WIDTH * HEIGHT * CHANNELS);
    float sum = 0.0f;
    for (int a = 0; a < KERNEL; a++)
      for (int b = 0; b < KERNEL; b++) {
        const int row = y - a, column = x - b;  // upper left corner of the window, in the source
        if (row < 0 || column < 0 || row % STRIDE || column % STRIDE) continue;
        if (row / STRIDE >= ROWS || column / STRIDE >= COLUMNS) continue;
        const int term = (channel * KERNEL + a) * KERNEL + b;
        sum += column_errors[term * positions + image * AREA + row / STRIDE * COLUMNS +
                             column / STRIDE];
      }
    source_errors[i] = sum;
  }
}
