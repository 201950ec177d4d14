// A barrier of all blocks of a launch, for a GPU only: a counter in device memory, by which all blocks, which must be
// resident at once, wait for each other (S. Xiao and W. Feng, "Inter-Block GPU Communication via Fast Barrier
// Synchronization", IPDPS 2010).
#pragma once
#include "portable.cuh"

#ifdef __CUDACC__

// Nanoseconds after which a block gives up waiting for the others.
constexpr unsigned long long GRID_PATIENCE = 1000000000ull;

__device__ __forceinline__ unsigned long long nanoseconds() {
  unsigned long long now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

// What any block wrote before the barrier is seen by all blocks after it. `arrived` counts up from 0 at the launch;
// `wanted` is its value when all blocks have come this time. Returns false, in every thread of every block sooner or
// later, when some block did not come: `failed` becomes 1, and the kernel must end.
__device__ __forceinline__ bool wait_for_grid(unsigned* arrived, unsigned* failed, unsigned wanted) {
  int given_up = 0;
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned seen;
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
    // the counter may wrap around in a long launch
    if (static_cast<int>(seen - wanted) < 0) {
      const unsigned long long began = nanoseconds();
      for (unsigned spins = 1;; spins++) {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
        if (static_cast<int>(seen - wanted) >= 0) break;
        if (spins % 256 == 0 && (*static_cast<volatile unsigned*>(failed) || nanoseconds() - began > GRID_PATIENCE)) {
          *static_cast<volatile unsigned*>(failed) = 1;
          given_up = 1;
          break;
        }
      }
    }
  }
  return !__syncthreads_or(given_up);
}

#endif
