// A matrix product by tiles in shared memory: C (M x N) = A (M x K) B (K x N).
//
// A block makes one tile of C and walks along K: it loads a tile of A and of B to shared memory, and every thread
// adds their product to results that it keeps in registers (CUDA C++ Programming Guide, "Shared Memory"; Volkov and
// Demmel, "Benchmarking GPUs to Tune Dense Linear Algebra", SC 2008, for the registers). Where C has few tiles and K
// is long, the sum over K is cut into slices that blocks sum side by side (split-K), and add_slices puts them
// together.
#pragma once
#include "arithmetic.cuh"

// The shape of one block's work: M x N results. cnnlib/stages/gemm_cuda.py chooses it by the number of rows, which
// for a convolution is its number of maps: six maps must not pay for 64.
template <int M_, int N_, int THREADS_>
struct Tile {
  static constexpr int M = M_, N = N_, THREADS = THREADS_;
  static constexpr int K = 32;  // terms of the sum held in shared memory at a time
  static constexpr int M_EACH = 4;
  static constexpr int M_THREADS = M / M_EACH, N_THREADS = THREADS / M_THREADS;
  static constexpr int N_EACH = N / N_THREADS;  // a thread has M_EACH x N_EACH results
  static constexpr int A_SIZE = K * (M + 1);
  static constexpr int B_SIZE = K * (N + 1);
  static_assert(M_THREADS * M_EACH == M && N_THREADS * N_EACH == N, "threads share out the results");
  static_assert(M_THREADS * N_THREADS == THREADS, "every thread has results");
  static_assert(M * K % THREADS == 0 && N * K % THREADS == 0, "every thread loads as many elements");
};

// Adds terms [from, to) of the sum for the block's tile at (row0, column0) and hands each result to `store`. a(row,
// k), b(k, column) read one element, and are only asked for elements that exist; *_K_FIRST says along which index
// neighbours lie side by side in memory, so that loads coalesce. All THREADS threads of a block must call it
// together. tile_a, tile_b: A_SIZE and B_SIZE shared floats.
template <class T, bool A_K_FIRST, bool B_K_FIRST, class A, class B, class Store>
__device__ __forceinline__ void multiply_tile(float* tile_a, float* tile_b, int row0, int column0, int rows,
                                              int columns, int from, int to, A a, B b, Store store) {
  const int thread = threadIdx.x, ty = thread / T::N_THREADS, tx = thread % T::N_THREADS;
  float sum[T::M_EACH][T::N_EACH];
  UNROLL_FOR(int y = 0; y < T::M_EACH; y++)
    UNROLL_FOR(int x = 0; x < T::N_EACH; x++) sum[y][x] = 0.0f;

  // While one piece of the sum is computed from shared memory the next is already on its way to registers.
  constexpr int A_LOADS = T::M * T::K / T::THREADS, B_LOADS = T::N * T::K / T::THREADS;
  float next_a[A_LOADS], next_b[B_LOADS];
  const auto fetch = [&](int k0) {
    UNROLL_FOR(int n = 0; n < A_LOADS; n++) {
      const int i = thread + n * T::THREADS;
      const int y = A_K_FIRST ? i / T::K : i % T::M;
      const int k = A_K_FIRST ? i % T::K : i / T::M;
      next_a[n] = row0 + y < rows && k0 + k < to ? a(row0 + y, k0 + k) : 0.0f;
    }
    UNROLL_FOR(int n = 0; n < B_LOADS; n++) {
      const int i = thread + n * T::THREADS;
      const int x = B_K_FIRST ? i / T::K : i % T::N;
      const int k = B_K_FIRST ? i % T::K : i / T::N;
      next_b[n] = column0 + x < columns && k0 + k < to ? b(k0 + k, column0 + x) : 0.0f;
    }
  };
  fetch(from);
  for (int k0 = from; k0 < to; k0 += T::K) {
    UNROLL_FOR(int n = 0; n < A_LOADS; n++) {
      const int i = thread + n * T::THREADS;
      const int y = A_K_FIRST ? i / T::K : i % T::M;
      const int k = A_K_FIRST ? i % T::K : i / T::M;
      tile_a[k * (T::M + 1) + y] = next_a[n];
    }
    UNROLL_FOR(int n = 0; n < B_LOADS; n++) {
      const int i = thread + n * T::THREADS;
      const int x = B_K_FIRST ? i / T::K : i % T::N;
      const int k = B_K_FIRST ? i % T::K : i / T::N;
      tile_b[k * (T::N + 1) + x] = next_b[n];
    }
    __syncthreads();
    if (k0 + T::K < to) fetch(k0 + T::K);
    for (int k = 0; k < T::K; k++) {
      float left[T::M_EACH], right[T::N_EACH];
      UNROLL_FOR(int y = 0; y < T::M_EACH; y++) left[y] = tile_a[k * (T::M + 1) + y * T::M_THREADS + ty];
      UNROLL_FOR(int x = 0; x < T::N_EACH; x++) right[x] = tile_b[k * (T::N + 1) + x * T::N_THREADS + tx];
      UNROLL_FOR(int y = 0; y < T::M_EACH; y++)
        UNROLL_FOR(int x = 0; x < T::N_EACH; x++) sum[y][x] = fmaf(left[y], right[x], sum[y][x]);
    }
    __syncthreads();
  }
  UNROLL_FOR(int y = 0; y < T::M_EACH; y++)
    UNROLL_FOR(int x = 0; x < T::N_EACH; x++) {
      const int row = row0 + y * T::M_THREADS + ty, column = column0 + x * T::N_THREADS + tx;
      if (row < rows && column < columns) store(row, column, sum[y][x]);
    }
}

// The slice of [0, length) that number `slice` of `slices` sums begins here.
__device__ __forceinline__ int slice_start(int slice, int slices, int length) {
  return min(length, slice * ceil_div(length, slices));
}

// gradient[i] = slices[0][i] + slices[1][i] + ...: slices (slice_count, size). A block has 32 neighbouring elements,
// SUM_THREADS threads each, so that many slices are read at once. scratch: 32 * SUM_THREADS shared floats.
template <int SUM_THREADS>
__device__ __forceinline__ void add_slices(float* scratch, const float* __restrict__ slices,
                                           float* __restrict__ gradient, int size, int slice_count) {
  const int lane = threadIdx.x % 32, share = threadIdx.x / 32;
  for (int first = blockIdx.x * 32; first < size; first += gridDim.x * 32) {
    const int i = first + lane;
    float sum = 0.0f;
    if (i < size)
      for (int slice = share; slice < slice_count; slice += SUM_THREADS) sum += slices[slice * size + i];
    scratch[threadIdx.x] = sum;
    __syncthreads();
    if (share == 0 && i < size) {
      for (int other = 1; other < SUM_THREADS; other++) sum += scratch[other * 32 + lane];
      gradient[i] = sum;
    }
    __syncthreads();
  }
}

// The sum of `value` over the block's THREADS threads, in the same order every time; in all threads.
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
