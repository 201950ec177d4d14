// Stage tuned: what blocks of one launch hand to each other without a barrier of the grid, each at its own pace.
//
// A stamped number is a float and the stamp of the step that made it, in one word of eight bytes, which is stored and
// loaded as a whole. So its reader sees by itself whether it has come, and needs neither a counter nor a fence: it waits
// for one way through the L2 cache (the protocol LL of NCCL's collectives). A release counts where there is too much to
// be stamped.
#pragma once
#include "grid.cuh"
#include "portable.cuh"
#ifndef __CUDACC__
#include <sched.h>
#endif

namespace tuned {

using Stamped = unsigned long long;

__device__ __forceinline__ unsigned stamp_of(Stamped word) { return static_cast<unsigned>(word >> 32); }
__device__ __forceinline__ float number_of(Stamped word) {
#ifdef __CUDACC__
  return __uint_as_float(static_cast<unsigned>(word));
#else
  return __int_as_float(static_cast<int>(static_cast<unsigned>(word)));
#endif
}

__device__ __forceinline__ Stamped load_stamped(const Stamped* at) {
#ifdef __CUDACC__
  Stamped word;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(at) : "memory");
  return word;
#else
  return __atomic_load_n(at, __ATOMIC_RELAXED);
#endif
}

__device__ __forceinline__ void store_stamped(Stamped* at, float number, unsigned stamp) {
#ifdef __CUDACC__
  const Stamped word = static_cast<Stamped>(stamp) << 32 | __float_as_uint(number);
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(at), "l"(word) : "memory");
#else
  const Stamped word = static_cast<Stamped>(stamp) << 32 | static_cast<unsigned>(__float_as_int(number));
  __atomic_store_n(at, word, __ATOMIC_RELAXED);
#endif
}

// *at, by which others see what this block has written before, if a barrier of the block came between.
__device__ __forceinline__ void add_release(unsigned* at) {
#ifdef __CUDACC__
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(at) : "memory");
#else
  __atomic_fetch_add(at, 1u, __ATOMIC_RELEASE);
#endif
}
__device__ __forceinline__ unsigned load_acquire(const unsigned* at) {
#ifdef __CUDACC__
  unsigned seen;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(at) : "memory");
  return seen;
#else
  return __atomic_load_n(at, __ATOMIC_ACQUIRE);
#endif
}

// A row of numbers on its way to other blocks: assigned as an array of floats is.
struct StampedRow {
  Stamped* at;
  unsigned stamp;

  struct Place {
    Stamped* at;
    unsigned stamp;
    __device__ __forceinline__ void operator=(float number) const { store_stamped(at, number, stamp); }
  };
  __device__ __forceinline__ StampedRow operator+(int offset) const { return {at + offset, stamp}; }
  __device__ __forceinline__ Place operator[](int i) const { return {at + i, stamp}; }
};

// How long a thread waits for what another block has promised. It gives up when another one has, or after a second, and
// takes what is there: its block must end soon.
struct Patience {
  unsigned* failed;
  bool given_up;

  struct Wait {
    unsigned spins;
    unsigned long long began;
  };
  // Waits until a counter, which may wrap around in a long launch, has come to `wanted`; what was released by those who
  // counted is seen then.
  __device__ __forceinline__ void wait_for(const unsigned* counter, unsigned wanted) {
    Wait wait = {0, 0};
    while (static_cast<int>(load_acquire(counter) - wanted) < 0)
      if (!lasts(wait)) return;
  }

  // After each time that a thread has found nothing: whether it waits on.
  __device__ __forceinline__ bool lasts(Wait& wait) {
#ifdef __CUDACC__
    if (++wait.spins % 256) return true;
    const unsigned long long now = nanoseconds(), most = GRID_PATIENCE;
#else
    sched_yield();
    if (++wait.spins % 256) return true;
    const unsigned long long now = ticks(), most = 20000000000ull;
#endif
    if (wait.spins == 256) wait.began = now;
    const bool others = *static_cast<volatile unsigned*>(failed);
    if (!others && now - wait.began < most) return true;
    *static_cast<volatile unsigned*>(failed) = 1;
    given_up = true;
    return false;
  }
};

// value[n] = the number at at(n), once it has this stamp; where at(n) is null, 0. First the thread waits for the last
// one alone, so that it does not keep asking for all of them; an EAGER one does, and so loses no time when they come.
template <bool EAGER = false, int N, class At>
__device__ __forceinline__ void take_stamped(float (&value)[N], At at, unsigned stamp, Patience& patience) {
  Patience::Wait wait = {0, 0};
  const Stamped* last = nullptr;
  UNROLL_FOR(int n = 0; n < N; n++) last = at(n) ? at(n) : last;
  if (!last) {
    UNROLL_FOR(int n = 0; n < N; n++) value[n] = 0.0f;
    return;
  }
  if (!EAGER)
    while (stamp_of(load_stamped(last)) != stamp)
      if (!patience.lasts(wait)) break;
  Stamped word[N];
  bool all = false;
#pragma unroll 1
  while (!all) {
    UNROLL_FOR(int n = 0; n < N; n++) word[n] = at(n) ? load_stamped(at(n)) : static_cast<Stamped>(stamp) << 32;
    all = true;
    UNROLL_FOR(int n = 0; n < N; n++) all = all && stamp_of(word[n]) == stamp;
    if (!all && !patience.lasts(wait)) break;
  }
  UNROLL_FOR(int n = 0; n < N; n++) value[n] = number_of(word[n]);
}

// What blocks hand to each other in this way, in device memory.
struct Handed {
  Stamped* traces;        // (count, TRACE)
  Stamped* partials;      // (count, PARTIALS)
  Stamped* weights;       // (PARTIALS,): of the convolutions, as they are after the step
  unsigned* dense_tiles;  // tiles of dense layers that have been updated in this launch
  unsigned* failed;

  // In one array (count TRACE + count PARTIALS + PARTIALS,).
  template <class Plan>
  static __device__ __forceinline__ Handed within(Stamped* all, int count, unsigned* dense_tiles, unsigned* failed) {
    Stamped* sums = all + static_cast<long long>(count) * Plan::TRACE;
    return {all, sums, sums + static_cast<long long>(count) * Plan::PARTIALS, dense_tiles, failed};
  }
};

}  // namespace tuned
