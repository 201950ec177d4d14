// Teams of a block: its threads in TEAMS equal parts, each with a barrier of its own.
#pragma once
#include "portable.cuh"

__device__ __forceinline__ int team() { return TEAMS == 1 ? 0 : threadIdx.x / TEAM; }
__device__ __forceinline__ int thread_rank() { return TEAMS == 1 ? threadIdx.x : threadIdx.x % TEAM; }

// All threads of a team wait for each other. Where there are no such barriers the whole block does: so all teams must
// come to the same ones in the same order.
__device__ __forceinline__ void team_barrier() {
#ifdef __CUDA_ARCH__
  if (TEAMS > 1) {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + team()), "n"(TEAM) : "memory");
    return;
  }
#endif
  __syncthreads();
}
