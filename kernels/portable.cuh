// What a kernel file may use beyond plain CUDA. The same text is built by nvcc for a GPU and, where there is none, by
// the machine's C++ compiler, for which emulated/threads.hpp plays CUDA's part. docs/kernels.md has the rules that
// make this possible.
#pragma once

#ifdef __CUDACC__

// An array shared by the threads of a block, declared in an entry point or in the one function that it calls; others
// get a pointer.
#define SHARED(type, name, n) __shared__ type name[n]
// The one array of a kernel that may be larger than the 48 KiB that a block has without asking. The launch names its
// bytes (shared_bytes of Kernel.bind). Aligned to 16 bytes.
#define SHARED_LARGE(type, name, n)                    \
  extern __shared__ __align__(16) char shared_large[]; \
  type* const name = reinterpret_cast<type*>(shared_large)
#define UNROLL _Pragma("unroll")
#define UNROLL_ONCE _Pragma("unroll 1")
#define UNROLL_TWICE _Pragma("unroll 2")

#else

#include "emulated/threads.hpp"

#define SHARED(type, name, n) \
  static char name##_site;    \
  type(&name)[n] =            \
      *static_cast<type(*)[n]>(::emulated_shared(&name##_site, sizeof(type) * (n), alignof(type), 0, #name))
#define SHARED_LARGE(type, name, n) \
  static char name##_site;          \
  type* const name = static_cast<type*>(::emulated_shared(&name##_site, sizeof(type) * (n), alignof(type), 1, #name))
#define UNROLL _Pragma("GCC unroll 32")
#define UNROLL_ONCE
#define UNROLL_TWICE

#endif

// Loads from the L2 cache: another block may have written the number since this kernel began, which the first-level
// cache of this multiprocessor would not show.
__device__ __forceinline__ float load_l2(const float* at) {
#ifdef __CUDACC__
  return __ldcg(at);
#else
  return *at;
#endif
}

// UNROLL_FOR (int i = 0; i < n; i++) is a loop that both compilers are asked to unroll.
#define UNROLL_FOR UNROLL for
// ROLLED_FOR and PAIRED_FOR are loops that nvcc is to leave as they are, or to unroll by two: unrolled as a whole they
// would take more registers than a thread has.
#define ROLLED_FOR UNROLL_ONCE for
#define PAIRED_FOR UNROLL_TWICE for

// Programmatic dependent launch (CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization"): a
// kernel that is launched so may begin while the one before it in the stream still runs. Each of its threads calls
// wait_for_previous_kernel() once, before it reads or writes anything in device memory: from there on the one before has
// ended, with all kernels before it, and what they wrote is seen. What comes earlier may prepare shared memory and
// registers from the kernel's arguments alone, and read what a kernel before the last one, or none, has written: every
// kernel waits before it lets the next one begin, so that when this one begins, those before the last have ended. let_next_kernel_start() is a hint: when every block has called it or has
// ended, the next kernel may begin in the room that is left. A source that is not launched so does not define
// PROGRAMMATIC_LAUNCH, and both compile to nothing; so they do for a GPU before compute capability 9.0. The emulated
// device runs kernels one after another and checks that all threads of such a kernel have waited once.
__device__ __forceinline__ void wait_for_previous_kernel() {
#ifdef PROGRAMMATIC_LAUNCH
#ifndef __CUDACC__
  emulated_wait_for_previous_kernel();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
#endif
}

__device__ __forceinline__ void let_next_kernel_start() {
#if defined(PROGRAMMATIC_LAUNCH) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// A clock of the multiprocessor (or of the machine), for differences only.
__device__ __forceinline__ unsigned long long ticks() {
#ifdef __CUDACC__
  return clock64();
#else
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000ull + now.tv_nsec;
#endif
}

// ENTRY_POINT(conv1, forward)(const float* x, int n) { ... } defines the kernel conv1_forward.
#define ENTRY_POINT(layer, name) extern "C" __global__ void layer##_##name
// ENTRY_POINT_BOUNDED also names the largest number of threads of a block, by which the compiler gives out registers.
#define ENTRY_POINT_BOUNDED(layer, name, threads) extern "C" __global__ void __launch_bounds__(threads) layer##_##name
// ENTRY_POINT_RESIDENT also names how many such blocks a multiprocessor is to have registers for.
#define ENTRY_POINT_RESIDENT(layer, name, threads, blocks) \
  extern "C" __global__ void __launch_bounds__(threads, blocks) layer##_##name

// for (int i : grid_range(n)): each i in [0, n) once over all threads of a one-dimensional grid of any size.
// for (int i : block_range(n)): likewise over the threads of a block (of any number of dimensions).
//
// On a GPU neighbours in the block take neighbouring i (coalesced). On the emulated device each thread takes a run of
// neighbouring i (vectorised, cache lines touched once). So no thread may rely on the i that it had in a range of
// another length: there must be a barrier between the two.
struct IndexRange {
  int first, last, step;

  struct Iterator {
    int index, step;
    __device__ __forceinline__ int operator*() const { return index; }
    __device__ __forceinline__ void operator++() { index += step; }
    // `last` may be jumped over by a stride, so "not yet past" replaces "not equal"
    __device__ __forceinline__ bool operator!=(const Iterator& other) const { return index < other.index; }
  };
  __device__ __forceinline__ Iterator begin() const { return {first, step}; }
  __device__ __forceinline__ Iterator end() const { return {last, step}; }
};

// The part of [0, n) of member `member` of `members`. n + members must fit an int.
__device__ __forceinline__ IndexRange index_range(int member, int members, int n) {
#ifdef __CUDACC__
  return {member, n, members};
#else
  const int share = (n + members - 1) / members;
  const int first = member * static_cast<long long>(share) < n ? member * share : n;
  return {first, n - first < share ? n : first + share, 1};
#endif
}

__device__ __forceinline__ int thread_in_block() {
  return static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
}

__device__ __forceinline__ int threads_in_block() { return static_cast<int>(blockDim.x * blockDim.y * blockDim.z); }

__device__ __forceinline__ IndexRange block_range(int n) {
  return index_range(thread_in_block(), threads_in_block(), n);
}

__device__ __forceinline__ IndexRange grid_range(int n) {
  const int threads = threads_in_block();
  return index_range(static_cast<int>(blockIdx.x) * threads + thread_in_block(), static_cast<int>(gridDim.x) * threads,
                     n);
}
