// Kernels that break a rule in a way that the emulated device reports; never launched on a GPU.
#define PROGRAMMATIC_LAUNCH
#include "portable.cuh"

ENTRY_POINT(wrong, some_end)(float* out) {
  if (threadIdx.x < 5) __syncthreads();
  out[threadIdx.x] = 1.0f;
}

ENTRY_POINT(wrong, two_barriers)(float* out) {
  if (threadIdx.x % 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1.0f;
}

template <int CALL>
__device__ void wait_in_template() {
  __syncthreads();
}

ENTRY_POINT(wrong, two_instances)(float* out) {
  if (threadIdx.x % 2) {
    wait_in_template<1>();
  } else {
    wait_in_template<2>();
  }
  out[threadIdx.x] = 1.0f;
}

ENTRY_POINT(wrong, one_round_less)(float* out) {
  for (unsigned i = 0; i < 4 + (threadIdx.x == 9); ++i) __syncthreads();
  out[threadIdx.x] = 1.0f;
}

ENTRY_POINT(wrong, lane_missing)(float* out) {
  float value = 1.0f;
  if (threadIdx.x != 7) value = __shfl_down_sync(0xffffffffu, value, 1);
  out[threadIdx.x] = value;
}

ENTRY_POINT(wrong, lane_at_barrier)(float* out) {
  float value = 1.0f;
  if (threadIdx.x == 7)
    __syncthreads();
  else
    value = __shfl_down_sync(0xffffffffu, value, 1);
  out[threadIdx.x] = value;
}

ENTRY_POINT(wrong, not_in_mask)(float* out) { out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.0f, 0); }

ENTRY_POINT(wrong, too_much_shared)(float* out) {
  SHARED(float, first, 8192);
  SHARED(float, second, 4097);
  first[threadIdx.x] = second[threadIdx.x] = 0.0f;
  out[threadIdx.x] = first[threadIdx.x];
}

// Only every second element of `board` is written before all are read.
ENTRY_POINT(wrong, reads_unwritten)(float* out) {
  SHARED(float, board, 64);
  if (threadIdx.x % 2) board[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = board[threadIdx.x];
}

ENTRY_POINT(wrong, no_barrier)(float* out) {
  SHARED(float, board, 64);
  board[threadIdx.x] = 1.0f;
  out[threadIdx.x] = board[63 - threadIdx.x];
}

ENTRY_POINT(wrong, shared_overrun)(float* out, int n) {
  SHARED(float, board, 64);
  SHARED(float, other, 64);
  other[threadIdx.x] = 0.0f;
  for (int i = threadIdx.x; i <= n; i += blockDim.x) board[i] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = board[threadIdx.x] + other[threadIdx.x];
}

ENTRY_POINT(wrong, array_overrun)(float* out, int n) {
  for (int i = threadIdx.x; i <= n; i += blockDim.x) out[i] = 1.0f;
}

ENTRY_POINT(wrong, signed_overflow)(int* out, int n) { out[threadIdx.x] = n + 1; }

ENTRY_POINT(wrong, well_behaved)(float* out) {
  SHARED(float, board, 64);
  board[threadIdx.x] = 2.0f;
  __syncthreads();
  out[threadIdx.x] = board[63 - threadIdx.x];
}

ENTRY_POINT(wrong, some_do_not_wait)(float* out) {
  if (threadIdx.x != 9) wait_for_previous_kernel();
  out[threadIdx.x] = 1.0f;
}
