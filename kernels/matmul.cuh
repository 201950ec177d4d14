// A shared-memory blocked matrix product, the lecture's: C (rows x columns) = A (rows x depth) B (depth x columns).
#pragma once
#include "portable.cuh"

// Shape of one block's work: TY x TX threads, each with RY x RX results in registers. Chosen by the number
// of rows, which for a convolution is its number of maps: six maps must not pay for 64.
template <int ROWS>
struct Tile {
  static constexpr int RY = 4;
  static constexpr int TY = ROWS <= 8 ? 2 : ROWS <= 16 ? 4 : ROWS <= 32 ? 8 : 16;
  static constexpr int THREADS = 256;
  static constexpr int TX = THREADS / TY;
  static constexpr int RX = TX >= 64 ? 1 : TX >= 32 ? 2 : 4;
  static constexpr int HEIGHT = TY * RY;  // rows of C a block makes
  static constexpr int WIDTH = TX * RX;   // columns of C a block makes
  static constexpr int DEPTH = 32;        // terms of the sum held in shared memory at a time
  static constexpr int A_SIZE = DEPTH * (HEIGHT + 1);
  static constexpr int B_SIZE = DEPTH * (WIDTH + 1);
};

// Adds terms [from, to) of the sum for the block's tile at (row0, column0) and hands each result to `store`.
// a(row, k), b(k, column) read one element, and are only asked for elements that exist; *_DEPTH_FIRST says
// along which index neighbours lie side by side in memory, so that loads coalesce.
// All THREADS threads of a block must call it together. tile_a, tile_b: A_SIZE and B_SIZE shared floats.
template <class T, bool A_DEPTH_FIRST, bool B_DEPTH_FIRST, class A, class B, class Store>
__device__ __forceinline__ void multiply_tile(float* tile_a, float* tile_b, int row0, int column0,
                                              int rows, int columns, int from, int to, A a, B b,
                                              Store store) {
  const int thread = threadIdx.x, ty = thread / T::TX, tx = thread % T::TX;
  float sum[T::RY][T::RX];
UNROLL
  for (int y = 0; y < T::RY; y++)
UNROLL
    for (int x = 0; x < T::RX; x++) sum[y][x] = 0.0f;

  // While one piece of the sum is computed from shared memory the next is already on its way to registers.
  constexpr int A_EACH = T::HEIGHT * T::DEPTH / T::THREADS, B_EACH = T::WIDTH * T::DEPTH / T::THREADS;
  float next_a[A_EACH], next_b[B_EACH];
  const auto fetch = [&](int k0) {
UNROLL
    for (int n = 0; n < A_EACH; n++) {
      const int i = thread + n * T::THREADS;
      const int y = A_DEPTH_FIRST ? i / T::DEPTH : i % T::HEIGHT;
      const int k = A_DEPTH_FIRST ? i % T::DEPTH : i / T::HEIGHT;
      next_a[n] = row0 + y < rows && k0 + k < to ? a(row0 + y, k0 + k) : 0.0f;
    }
UNROLL
    for (int n = 0; n < B_EACH; n++) {
      const int i = thread + n * T::THREADS;
      const int x = B_DEPTH_FIRST ? i / T::DEPTH : i % T::WIDTH;
      const int k = B_DEPTH_FIRST ? i % T::DEPTH : i / T::WIDTH;
      next_b[n] = column0 + x < columns && k0 + k < to ? b(k0 + k, column0 + x) : 0.0f;
    }
  };
  fetch(from);
  for (int k0 = from; k0 < to; k0 += T::DEPTH) {
UNROLL
    for (int n = 0; n < A_EACH; n++) {
      const int i = thread + n * T::THREADS;
      const int y = A_DEPTH_FIRST ? i / T::DEPTH : i % T::HEIGHT;
      const int k = A_DEPTH_FIRST ? i % T::DEPTH : i / T::HEIGHT;
      tile_a[k * (T::HEIGHT + 1) + y] = next_a[n];
    }
UNROLL
    for (int n = 0; n < B_EACH; n++) {
      const int i = thread + n * T::THREADS;
      const int x = B_DEPTH_FIRST ? i / T::DEPTH : i % T::WIDTH;
      const int k = B_DEPTH_FIRST ? i % T::DEPTH : i / T::WIDTH;
      tile_b[k * (T::WIDTH + 1) + x] = next_b[n];
    }
    __syncthreads();
    if (k0 + T::DEPTH < to) fetch(k0 + T::DEPTH);
    for (int k = 0; k < T::DEPTH; k++) {
      float left[T::RY], right[T::RX];
UNROLL
      for (int y = 0; y < T::RY; y++) left[y] = tile_a[k * (T::HEIGHT + 1) + y * T::TY + ty];
UNROLL
      for (int x = 0; x < T::RX; x++) right[x] = tile_b[k * (T::WIDTH + 1) + x * T::TX + tx];
UNROLL
      for (int y = 0; y < T::RY; y++)
UNROLL
        for (int x = 0; x < T::RX; x++) sum[y][x] = fmaf(left[y], right[x], sum[y][x]);
    }
    __syncthreads();
  }
UNROLL
  for (int y = 0; y < T::RY; y++)
UNROLL
    for (int x = 0; x < T::RX; x++) {
      const int row = row0 + y * T::TY + ty, column = column0 + x * T::TX + tx;
      if (row < rows && column < columns) store(row, column, sum[y][x]);
    }
}

// The slice of [0, length) that number `slice` of `slices` sums.
__device__ __forceinline__ int slice_start(int slice, int slices, int length) {
  return min(length, slice * ((length + slices - 1) / slices));
}

// gradient[i] = slices[0][i] + slices[1][i] + ...: slices (slices, size). Blocks of 256: 32 neighbouring
// elements, eight threads each, so that many slices are read at once. scratch: 256 shared floats.
__device__ __forceinline__ void add_slices(float* scratch, const float* __restrict__ slices,
                                           float* __restrict__ gradient, int size, int slice_count) {
  const int lane = threadIdx.x % 32, share = threadIdx.x / 32;
  for (int first = blockIdx.x * 32; first < size; first += gridDim.x * 32) {
    const int i = first + lane;
    float sum = 0.0f;
    if (i < size)
      for (int slice = share; slice < slice_count; slice += 8) sum += slices[slice * size + i];
    scratch[threadIdx.x] = sum;
    __syncthreads();
    if (share == 0 && i < size) {
      for (int other = 1; other < 8; other++) sum += scratch[other * 32 + lane];
      gradient[i] = sum;
    }
    __syncthreads();
  }
}

// result = sum of `value` over the block's THREADS threads, in the same order every time; in all threads.
// scratch: THREADS shared floats, free again after the next barrier.
template <int THREADS>
__device__ __forceinline__ float block_sum(float value, float* scratch) {
  scratch[threadIdx.x] = value;
  __syncthreads();
  for (int half = THREADS / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
    __syncthreads();
  }
  return scratch[0];
}
