// One thread's share of a convolution with activation and subsampling, for the stages that fuse them.
#pragma once
#include "layers.cuh"

// Convolution sums of one window of WINDOW x WINDOW target positions, for EACH neighbouring maps:
// sum[y][x][m] += sum over c, i, j of weight[term][m] source[c, y STRIDE + i, x STRIDE + j].
// row(c, a) points at the first element seen by the window in source row a of channel c.
// weights: (TERMS, MAPS) in shared memory, at the first of the maps; all threads of a warp that share maps read
// the same address, which the hardware broadcasts.
template <int CHANNELS, int KERNEL, int STRIDE, int WINDOW, int MAPS, int EACH, class Row>
__device__ __forceinline__ void convolve_window(float (&sum)[WINDOW][WINDOW][EACH], Row row,
                                                const float* weights) {
  constexpr int SPAN = (WINDOW - 1) * STRIDE + KERNEL;
  for (int c = 0; c < CHANNELS; c++) {
    float patch[SPAN][SPAN];
UNROLL
    for (int a = 0; a < SPAN; a++) {
      const float* values = row(c, a);
UNROLL
      for (int b = 0; b < SPAN; b++) patch[a][b] = values[b];
    }
UNROLL
    for (int i = 0; i < KERNEL; i++)
UNROLL
      for (int j = 0; j < KERNEL; j++) {
        const float* weight = weights + ((c * KERNEL + i) * KERNEL + j) * MAPS;
UNROLL
        for (int m = 0; m < EACH; m++)
UNROLL
          for (int y = 0; y < WINDOW; y++)
UNROLL
            for (int x = 0; x < WINDOW; x++)
              sum[y][x][m] = fmaf(patch[y * STRIDE + i][x * STRIDE + j], weight[m], sum[y][x][m]);
      }
  }
}

// What a window's activated values become: their maximum (and the winner's place, first of equals) or mean.
template <int WINDOW, int METHOD>
__device__ __forceinline__ float subsample_window(const float (&value)[WINDOW][WINDOW], int* winner) {
  float result = value[0][0];
  *winner = 0;
  if (METHOD == MAX) {
UNROLL
    for (int y = 0; y < WINDOW; y++)
UNROLL
      for (int x = 0; x < WINDOW; x++)
        // a NaN wins and stays: otherwise a diverged run would hide behind its neighbours
        if (value[y][x] > result || (value[y][x] != value[y][x] && result == result)) {
          result = value[y][x];
          *winner = y * WINDOW + x;
        }
    return result;
  }
  result = 0.0f;
UNROLL
  for (int y = 0; y < WINDOW; y++)
UNROLL
    for (int x = 0; x < WINDOW; x++) result += value[y][x];
  return result / float(WINDOW * WINDOW);
}
