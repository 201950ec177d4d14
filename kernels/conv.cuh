// One thread's share of a convolution with activation and subsampling, for the stages that fuse these layers.
#pragma once
#include "layers.cuh"

// What the backward pass of a convolution, with the activation and subsampling fused to it, reads and writes in device
// memory. Arrays of maps have all images of the batch, one after the other.
struct ConvArrays {
  const float* source;           // (count, CHANNELS, HEIGHT, WIDTH)
  const float* weight;           // (MAPS, TERMS)
  const float* bias;             // (MAPS,)
  const float* target;           // (count, MAPS, OUT_ROWS, OUT_COLUMNS)
  const unsigned char* winners;  // of the same shape; used only for a maximum over windows
  const float* target_errors;    // of the same shape
  float* source_errors;          // of the shape of source; not used by a network's first layer
  float* partials;               // (groups, weight gradient and then bias gradient)
};

// Convolution sums of one window of WINDOW_ROWS x WINDOW_COLUMNS positions, for MAPS_EACH neighbouring maps, all of them
// sizes of the layer:
// sum[y][x][m] += sum over c, i, j of weight[term][m] source[c, y STRIDE_ROWS + i, x STRIDE_COLUMNS + j].
// row(c, a) points at the first element seen by the window in source row a of channel c.
// weights: (TERMS, MAPS) in shared memory, at the first of the maps; all threads of a warp that share maps read
// the same address, which the hardware broadcasts.
template <class Layer, int MAPS, int WINDOW_ROWS, int WINDOW_COLUMNS, int MAPS_EACH, class Row>
__device__ __forceinline__ void convolve_window(float (&sum)[WINDOW_ROWS][WINDOW_COLUMNS][MAPS_EACH], Row row,
                                                const float* weights) {
  constexpr int KERNEL_ROWS = Layer::KERNEL_ROWS, KERNEL_COLUMNS = Layer::KERNEL_COLUMNS;
  constexpr int STRIDE_ROWS = Layer::STRIDE_ROWS, STRIDE_COLUMNS = Layer::STRIDE_COLUMNS;
  constexpr int HIGH = (WINDOW_ROWS - 1) * STRIDE_ROWS + KERNEL_ROWS;
  constexpr int WIDE = (WINDOW_COLUMNS - 1) * STRIDE_COLUMNS + KERNEL_COLUMNS;
  for (int c = 0; c < Layer::CHANNELS; c++) {
    float patch[HIGH][WIDE];
    UNROLL_FOR(int a = 0; a < HIGH; a++) {
      const float* values = row(c, a);
      UNROLL_FOR(int b = 0; b < WIDE; b++) patch[a][b] = values[b];
    }
    UNROLL_FOR(int i = 0; i < KERNEL_ROWS; i++)
      UNROLL_FOR(int j = 0; j < KERNEL_COLUMNS; j++) {
        const float* weight = weights + ((c * KERNEL_ROWS + i) * KERNEL_COLUMNS + j) * MAPS;
        UNROLL_FOR(int m = 0; m < MAPS_EACH; m++)
          UNROLL_FOR(int y = 0; y < WINDOW_ROWS; y++)
            UNROLL_FOR(int x = 0; x < WINDOW_COLUMNS; x++)
              sum[y][x][m] = fmaf(patch[y * STRIDE_ROWS + i][x * STRIDE_COLUMNS + j], weight[m], sum[y][x][m]);
      }
  }
}

// The maximum of a window's activated values (and *winner, which of them it is: the first of equals), or their mean.
template <int METHOD, int WINDOW_ROWS, int WINDOW_COLUMNS>
__device__ __forceinline__ float subsample_window(const float (&value)[WINDOW_ROWS][WINDOW_COLUMNS], int* winner) {
  float result = value[0][0];
  *winner = 0;
  if (METHOD == MAX) {
    UNROLL_FOR(int y = 0; y < WINDOW_ROWS; y++)
      UNROLL_FOR(int x = 0; x < WINDOW_COLUMNS; x++)
        // a NaN wins and stays: otherwise a diverged run would hide behind its neighbours
        if (value[y][x] > result || (value[y][x] != value[y][x] && result == result)) {
          result = value[y][x];
          *winner = y * WINDOW_COLUMNS + x;
        }
    return result;
  }
  result = 0.0f;
  UNROLL_FOR(int y = 0; y < WINDOW_ROWS; y++)
    UNROLL_FOR(int x = 0; x < WINDOW_COLUMNS; x++) result += value[y][x];
  return result / float(WINDOW_ROWS * WINDOW_COLUMNS);
}

// Adds one row of positions to the gradient of KERNEL neighbouring weights: sum[j] += delta[x] values[x STRIDE + j]
// over x < columns, and to that of the bias: sum[KERNEL] += delta[x]. The sliding window stays in registers.
template <int KERNEL, int STRIDE>
__device__ __forceinline__ void add_row_gradient(float (&sum)[KERNEL + 1], const float* delta, const float* values,
                                                 int columns) {
  float window[KERNEL];
  UNROLL_FOR(int j = 0; j < KERNEL; j++) window[j] = values[j];
  for (int x = 0; x < columns; x++) {
    UNROLL_FOR(int j = 0; j < KERNEL; j++) sum[j] = fmaf(delta[x], window[j], sum[j]);
    sum[KERNEL] += delta[x];
    if (x + 1 == columns) break;
    UNROLL_FOR(int j = 0; j < KERNEL; j++)
      window[j] = j + STRIDE < KERNEL ? window[(j + STRIDE) % KERNEL] : values[(x + 1) * STRIDE + j];
  }
}

// A row of the weight gradient is (map, channel, i), i a row of the kernel: KERNEL_COLUMNS neighbouring weights, whose
// number is KERNEL below. PER_MAP of these rows belong to a map. Thread t owns rows
// row0 + owned * (THREADS / SPLIT_K); SPLIT_K threads next to each other share one row, and the first adds up what
// the others found, in order, and writes it: partial = weight gradient (MAPS, TERMS), then bias gradient (MAPS,).
// scratch: THREADS * ROWS_EACH * ENTRIES shared floats if SPLIT_K > 1. All threads must call it together.
template <int THREADS, int SPLIT_K, int PER_MAP, int MAPS, int ROWS_EACH, int ENTRIES>
__device__ __forceinline__ void write_gradient_rows(float (&sum)[ROWS_EACH][ENTRIES], int row0, float* scratch,
                                                    float* __restrict__ partial) {
  constexpr int KERNEL = ENTRIES - 1;  // the last entry is the bias gradient's
  const int split = threadIdx.x % SPLIT_K;
  if (SPLIT_K > 1) {
    __syncthreads();
    UNROLL_FOR(int owned = 0; owned < ROWS_EACH; owned++)
      UNROLL_FOR(int j = 0; j < ENTRIES; j++) scratch[(owned * ENTRIES + j) * THREADS + threadIdx.x] = sum[owned][j];
    __syncthreads();
    if (split == 0)
      UNROLL_FOR(int owned = 0; owned < ROWS_EACH; owned++)
        UNROLL_FOR(int j = 0; j < ENTRIES; j++)
          for (int other = 1; other < SPLIT_K; other++)
            sum[owned][j] += scratch[(owned * ENTRIES + j) * THREADS + threadIdx.x + other];
    __syncthreads();
  }
  if (split != 0) return;
  UNROLL_FOR(int owned = 0; owned < ROWS_EACH; owned++) {
    const int row = row0 + owned * (THREADS / SPLIT_K);
    if (row >= MAPS * PER_MAP) break;
    UNROLL_FOR(int j = 0; j < KERNEL; j++) partial[row * KERNEL + j] = sum[owned][j];
    // every row of a map has summed the map's errors; the first one's are the bias gradient
    if (row % PER_MAP == 0) partial[MAPS * PER_MAP * KERNEL + row / PER_MAP] = sum[owned][KERNEL];
  }
}
