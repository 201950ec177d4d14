// Kernels that measure a machine's limits, one limit each; cnnlib/probes/ runs and times them.
#pragma once
#include "portable.cuh"

// Follows the chain p = next[p] for `hops` hops, so that each load waits for the one before. *place is where the chain
// begins, and in the end where the next launch continues.
ENTRY_POINT(probe, follow_chain)(const int* next, int* place, int hops) {
  if (blockIdx.x || threadIdx.x) return;
  int p = *place;
  for (int i = 0; i < hops; ++i) p = next[p];
  *place = p;
}

// Follows a chain of `count` numbers in shared memory, to which it is copied first. The copy takes as long for few
// hops as for many, so the difference between two launches is that between their hops.
ENTRY_POINT(probe, follow_chain_shared)(const int* next, int* place, int count, int hops) {
  SHARED_LARGE(int, chain, count);
  for (int i : block_range(count)) chain[i] = next[i];
  __syncthreads();
  if (threadIdx.x) return;
  int p = *place;
  for (int i = 0; i < hops; ++i) p = chain[p];
  *place = p;
}

ENTRY_POINT(probe, do_nothing)(int* nothing) {}

// `rounds` barriers of the block, one after the other.
ENTRY_POINT(probe, wait_in_block)(int* waited, int rounds) {
  for (int i = 0; i < rounds; ++i) __syncthreads();
  if (threadIdx.x == 0) waited[blockIdx.x] = rounds;
}

// target = source (count,), four numbers at a time; count is a multiple of four.
ENTRY_POINT(probe, copy_numbers)(const float* source, float* target, int count) {
  const float4* from = reinterpret_cast<const float4*>(source);
  float4* to = reinterpret_cast<float4*>(target);
  for (int i : grid_range(count / 4)) to[i] = from[i];
}

// Every thread counts to `rounds` in each of CHAINS independent sums, by fused multiply-adds: factor and step are 1.
ENTRY_POINT(probe, multiply_add)(float* sums, float factor, float step, int rounds) {
  constexpr int CHAINS = 8;
  float sum[CHAINS];
  UNROLL_FOR(int c = 0; c < CHAINS; ++c) sum[c] = 0;
  for (int i = 0; i < rounds; ++i) {
    UNROLL_FOR(int c = 0; c < CHAINS; ++c) sum[c] = fmaf(sum[c], factor, step);
  }
  float total = 0;
  UNROLL_FOR(int c = 0; c < CHAINS; ++c) total += sum[c];
  sums[blockIdx.x * blockDim.x + threadIdx.x] = total;
}

#ifdef __CUDACC__

// `rounds` barriers of the whole grid, whose blocks must all be resident: each block adds itself to `arrived` and waits
// until all have come in this round. A block that waits too long sets `failed`, and then no block waits any more; the
// others read it only when they have waited long themselves.
ENTRY_POINT(probe, wait_in_grid)(unsigned* arrived, unsigned* failed, int rounds) {
  constexpr int PATIENCE = 1 << 22;
  for (int round = 1; round <= rounds; ++round) {
    int gone = 0;
    __syncthreads();
    if (threadIdx.x == 0) {
      const unsigned wanted = round * gridDim.x;
      unsigned seen;
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
      for (int spins = 0;; ++spins) {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
        if (seen >= wanted) break;
        if (spins == PATIENCE || (spins % 1024 == 1023 && *static_cast<volatile unsigned*>(failed))) {
          *static_cast<volatile unsigned*>(failed) = gone = 1;
          break;
        }
      }
    }
    if (__syncthreads_or(gone)) return;
  }
}

// Products of 16x8 and 8x8 ones by tensor cores, in TF32, added to CHAINS sums of 16x8; each number of each sum ends as
// 8 * rounds. Every lane writes the sum of its numbers.
ENTRY_POINT(probe, multiply_matrices)(float* sums, int rounds) {
#if __CUDA_ARCH__ >= 800  // older GPUs have no TF32; the sums stay unwritten
  constexpr int CHAINS = 4;
  float c[CHAINS][4] = {};
  const unsigned one = __float_as_int(1.0f);
  for (int i = 0; i < rounds; ++i) {
    UNROLL_FOR(int chain = 0; chain < CHAINS; ++chain)
      asm volatile(
          "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, {%4,%4}, "
          "{%0,%1,%2,%3};"
          : "+f"(c[chain][0]), "+f"(c[chain][1]), "+f"(c[chain][2]), "+f"(c[chain][3])
          : "r"(one));
  }
  float total = 0;
  for (int chain = 0; chain < CHAINS; ++chain)
    for (int j = 0; j < 4; ++j) total += c[chain][j];
  sums[blockIdx.x * blockDim.x + threadIdx.x] = total;
#endif
}

#endif
