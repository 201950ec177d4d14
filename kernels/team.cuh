// A block's threads in equal teams, each with a barrier of its own, so that one team computes while another waits.
#pragma once
#include "portable.cuh"

template <int BLOCK_, int TEAMS_>
struct Threads {
  static constexpr int BLOCK = BLOCK_, TEAMS = TEAMS_, TEAM = BLOCK / TEAMS;
  static constexpr int WARPS = BLOCK / 32, TEAM_WARPS = TEAM / 32;
  static_assert(TEAM * TEAMS == BLOCK && TEAM % 32 == 0, "a team is whole warps");

  // The calling thread's team, and its rank in it.
  static __device__ __forceinline__ int team() { return TEAMS == 1 ? 0 : threadIdx.x / TEAM; }
  static __device__ __forceinline__ int thread_rank() { return TEAMS == 1 ? threadIdx.x : threadIdx.x % TEAM; }

  // All threads of a team wait for each other. An emulated device has no such barriers and the whole block waits: so
  // all teams must come to the same ones in the same order. Site: a type that names the caller, so that the emulated
  // device can distinguish two callers' barriers.
  template <class Site>
  static __device__ __forceinline__ void team_barrier() {
#ifdef __CUDA_ARCH__
    if (TEAMS > 1) {
      asm volatile("bar.sync %0, %1;" ::"r"(1 + team()), "n"(TEAM) : "memory");
      return;
    }
#endif
    __syncthreads();
  }
};
