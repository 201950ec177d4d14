// Asynchronous copies from device to shared memory, with a plain equivalent for devices without them.
#pragma once
#include "layers.cuh"

// *target (shared) = *source, on its way until wait_for_copies().
__device__ __forceinline__ void copy_async(float* target, const float* source) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(target));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(source) : "memory");
#else
  *target = *source;
#endif
}

// The same for four floats; both addresses on 16-byte boundaries.
__device__ __forceinline__ void copy_async(Quad* target, const Quad* source) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(target));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(source) : "memory");
#else
  *target = *source;
#endif
}

// The calling thread's copies have arrived; a barrier makes them visible to the other threads.
__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;" ::: "memory");
#endif
}
