// Kernels that break a rule in a way that the emulated device reports; never launched on a GPU.
#include "portable.cuh"

#define LAYER wrong
namespace wrong {

ENTRY(some_end)(float* out) {
    if (threadIdx.x < 5) __syncthreads();
    out[threadIdx.x] = 1.0f;
}

ENTRY(two_barriers)(float* out) {
    if (threadIdx.x % 2) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out[threadIdx.x] = 1.0f;
}

ENTRY(one_round_less)(float* out) {
    for (unsigned i = 0; i < 4 + (threadIdx.x == 9); ++i) __syncthreads();
    out[threadIdx.x] = 1.0f;
}

ENTRY(lane_missing)(float* out) {
    float value = 1.0f;
    if (threadIdx.x != 7) value = __shfl_down_sync(0xffffffffu, value, 1);
    out[threadIdx.x] = value;
}

ENTRY(lane_at_barrier)(float* out) {
    float value = 1.0f;
    if (threadIdx.x == 7) __syncthreads();
    else value = __shfl_down_sync(0xffffffffu, value, 1);
    out[threadIdx.x] = value;
}

ENTRY(not_in_mask)(float* out) { out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.0f, 0); }

ENTRY(too_much_shared)(float* out) {
    SHARED(float, first, 8192);
    SHARED(float, second, 4097);
    first[threadIdx.x] = second[threadIdx.x] = 0.0f;
    out[threadIdx.x] = first[threadIdx.x];
}

// Only every second element of `board` is written before all are read.
ENTRY(reads_unwritten)(float* out) {
    SHARED(float, board, 64);
    if (threadIdx.x % 2) board[threadIdx.x] = 1.0f;
    __syncthreads();
    out[threadIdx.x] = board[threadIdx.x];
}

ENTRY(no_barrier)(float* out) {
    SHARED(float, board, 64);
    board[threadIdx.x] = 1.0f;
    out[threadIdx.x] = board[63 - threadIdx.x];
}

ENTRY(shared_overrun)(float* out, int n) {
    SHARED(float, board, 64);
    SHARED(float, other, 64);
    other[threadIdx.x] = 0.0f;
    for (int i = threadIdx.x; i <= n; i += blockDim.x) board[i] = 1.0f;
    __syncthreads();
    out[threadIdx.x] = board[threadIdx.x] + other[threadIdx.x];
}

ENTRY(array_overrun)(float* out, int n) {
    for (int i = threadIdx.x; i <= n; i += blockDim.x) out[i] = 1.0f;
}

ENTRY(signed_overflow)(int* out, int n) { out[threadIdx.x] = n + 1; }

ENTRY(well_behaved)(float* out) {
    SHARED(float, board, 64);
    board[threadIdx.x] = 2.0f;
    __syncthreads();
    out[threadIdx.x] = board[63 - threadIdx.x];
}

}  // namespace wrong
#undef LAYER
