// Asynchronous copies from device to shared memory, from compute capability 8.0 on; older GPUs and the emulated device
// copy at once.
#pragma once
#include "layers.cuh"

// Where copies are made at once, the emulated device is informed of them, if it is watched: see emulated/watch.hpp.
__device__ __forceinline__ void copy_begun(const void* target, int bytes) {
#ifndef __CUDACC__
  emulated_copy_begins(target, bytes);
#endif
}
__device__ __forceinline__ void copies_ended() {
#ifndef __CUDACC__
  emulated_copies_end();
#endif
}

// *target = *source, from device to shared memory; the copy is in flight until wait_for_copies().
__device__ __forceinline__ void copy_async(float* target, const float* source) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(target));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(source) : "memory");
#else
  *target = *source;
  copy_begun(target, sizeof *target);
#endif
}

// Copies four floats likewise; both addresses are on 16-byte boundaries.
__device__ __forceinline__ void copy_async(Float4* target, const Float4* source) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(target));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(source) : "memory");
#else
  *target = *source;
  copy_begun(target, sizeof *target);
#endif
}

// Copies four floats, or writes four zeros where the source is not `there` and need not exist.
__device__ __forceinline__ void copy_async_or_zero(Float4* target, const Float4* source, bool there) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(target));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source), "r"(there ? 16 : 0)
               : "memory");
#else
  *target = there ? *source : Float4{{0.0f, 0.0f, 0.0f, 0.0f}};
  copy_begun(target, sizeof *target);
#endif
}

// All threads of a block copy `count` Float4s; each thread's share belongs to its own group of copies.
__device__ __forceinline__ void copy_float4s(float* target, const float* source, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x)
    copy_async(reinterpret_cast<Float4*>(target) + i, reinterpret_cast<const Float4*>(source) + i);
}

// Makes a group of the calling thread's copies since the last such call.
__device__ __forceinline__ void end_group_of_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most LATE of the calling thread's groups are in flight; a barrier makes the others visible to other
// threads.
template <int LATE>
__device__ __forceinline__ void wait_for_groups() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(LATE) : "memory");
#else
  copies_ended();
#endif
}

// Waits for all of the calling thread's copies; a barrier makes them visible to other threads.
__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;" ::: "memory");
#else
  copies_ended();
#endif
}

// Bulk copies, made by the hardware's own copy engine (the Tensor Memory Accelerator) and counted by an mbarrier:
// CUDA C++ Programming Guide, "Asynchronous Data Copies using the Tensor Memory Accelerator". One thread initialises
// `arrived`, which lies in shared memory. In each round one thread says how many bytes to expect, the threads for which
// begins_bulk_copies() holds begin copies of as many, and all threads wait. The caller needs a barrier between the last
// use of the target and the round's first copy, and one between waiting and using it. GPUs before compute capability 9.0
// and the emulated device have no such engine: there all threads copy, each its share, as the functions above do. So they do in a source that
// defines NO_BULK_COPIES, which shows what the engine is worth.
struct BulkCopyBarrier {
  unsigned long long* arrived;
  unsigned round;
  bool pending;  // the round has begun and has not been waited for
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && !defined(NO_BULK_COPIES)

__device__ __forceinline__ unsigned shared_address(const void* at) {
  return static_cast<unsigned>(__cvta_generic_to_shared(at));
}

__device__ __forceinline__ void init_bulk_copies(unsigned long long* arrived) {
  asm volatile("mbarrier.init.shared.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(shared_address(arrived))
               : "memory");
}

__device__ __forceinline__ bool begins_bulk_copies() { return threadIdx.x == 0; }

// By each thread that copies, before it does: what was written before, here or (after a barrier) by other blocks, is
// what the engine will see.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async;" ::: "memory"); }

__device__ __forceinline__ void expect_bytes(BulkCopyBarrier& to, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(to.arrived)), "r"(bytes)
               : "memory");
}

// Both at 16-byte boundaries, and a multiple of 4 floats.
__device__ __forceinline__ void copy_bulk(float* target, const float* source, int floats, BulkCopyBarrier& to) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(target)),
               "l"(source), "r"(floats * 4), "r"(shared_address(to.arrived))
               : "memory");
}

// The same, by all lanes of one warp.
__device__ __forceinline__ void copy_bulk_by_warp(float* target, const float* source, int floats, BulkCopyBarrier& to) {
  if (threadIdx.x % 32 == 0) copy_bulk(target, source, floats, to);
}

__device__ __forceinline__ void wait_for_bulk_copies(BulkCopyBarrier& of) {
  if (!of.pending) return;
  unsigned done = 0;
  for (int tries = 0; !done; tries++) {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(shared_address(of.arrived)), "r"(of.round % 2)
                 : "memory");
    if (tries > 1000000) __trap();  // no copy takes so long
  }
  of.round++;
  of.pending = false;
}

#else

__device__ __forceinline__ void init_bulk_copies(unsigned long long*) {}
__device__ __forceinline__ bool begins_bulk_copies() { return true; }
__device__ __forceinline__ void fence_async_proxy() {}
__device__ __forceinline__ void expect_bytes(BulkCopyBarrier& to, int) {
#ifndef __CUDACC__
  // an mbarrier would go through two phases, and who waits would wait for ever
  if (to.round) emulated_give_up("bulk copies are expected twice before they are waited for");
  to.round = 1;
#endif
}
__device__ __forceinline__ void copy_bulk(float* target, const float* source, int floats, BulkCopyBarrier&) {
  copy_float4s(target, source, floats / 4);
}
__device__ __forceinline__ void copy_bulk_by_warp(float* target, const float* source, int floats, BulkCopyBarrier&) {
#pragma unroll 4
  for (int i = threadIdx.x % 32; i < floats / 4; i += 32)
    copy_async(reinterpret_cast<Float4*>(target) + i, reinterpret_cast<const Float4*>(source) + i);
}
__device__ __forceinline__ void wait_for_bulk_copies(BulkCopyBarrier& of) {
#ifndef __CUDACC__
  if (of.pending && threadIdx.x == 0 && !of.round) emulated_give_up("bulk copies are waited for that are not expected");
  of.round = 0;
#endif
  if (of.pending) wait_for_copies();
  of.pending = false;
}

#endif
