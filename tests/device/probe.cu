// Kernels that try out what a device promises; on the emulated device and on a GPU.
#define PROGRAMMATIC_LAUNCH
#include "portable.cuh"

constexpr unsigned FULL = 0xffffffffu;

ENTRY_POINT(probe, write_arguments)(float* out, const int* ints, const unsigned char* bytes, int i, unsigned u,
                                    float f) {
  if (grid_range(1).first != 0) return;
  out[0] = static_cast<float>(i);
  out[1] = static_cast<float>(u);
  out[2] = f;
  out[3] = static_cast<float>(ints[1]);
  out[4] = static_cast<float>(bytes[2]);
}

// out (n,) += 1 for each visit, by whichever way of walking over n
ENTRY_POINT(probe, visit_strided)(int* out, int n) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) atomicAdd(&out[i], 1);
}
ENTRY_POINT(probe, visit_range)(int* out, int n) {
  for (int i : grid_range(n)) out[i] += 1;
}
ENTRY_POINT(probe, visit_block_range)(int* out, int n) {
  if (blockIdx.x == 0)
    for (int i : block_range(n)) out[i] += 1;
}

// out (gridDim.z, gridDim.y, gridDim.x, blockDim.z, blockDim.y, blockDim.x)
ENTRY_POINT(probe, write_indices)(int* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] =
      static_cast<int>(threadIdx.x + 10 * threadIdx.y + 100 * threadIdx.z + 1000 * blockIdx.x + 10000 * blockIdx.y +
                       100000 * blockIdx.z);
}

// out[block] = sum of source, over a tree in shared memory; blockDim.x a power of two up to 1024
ENTRY_POINT(probe, sum_tree)(const float* source, float* out, int n) {
  SHARED(float, partial, 1024);
  const int t = threadIdx.x;
  float sum = 0;
  for (int i = t; i < n; i += blockDim.x) sum += source[i];
  partial[t] = sum;
  __syncthreads();
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    if (t < half) partial[t] += partial[t + half];
    __syncthreads();
  }
  if (t == 0) out[blockIdx.x] = partial[0];
}

// out[block] = sum of source, by shuffles; blockDim.x a multiple of 32
ENTRY_POINT(probe, sum_shuffle)(const float* source, float* out, int n) {
  SHARED(float, partial, 32);
  const int t = threadIdx.x, warps = blockDim.x / 32;
  float sum = 0;
  for (int i = t; i < n; i += blockDim.x) sum += source[i];
  for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_down_sync(FULL, sum, delta);
  if (t % 32 == 0) partial[t / 32] = sum;
  __syncthreads();
  if (t < 32) {
    sum = t < warps ? partial[t] : 0.0f;
    for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_xor_sync(FULL, sum, delta);
    if (t == 0) out[blockIdx.x] = sum;
  }
}

// c (n, n) = a (n, n) b (n, n) by tiles of 16 x 16; any n, any grid
ENTRY_POINT(probe, multiply_tiles)(const float* __restrict__ a, const float* __restrict__ b, float* __restrict__ c,
                                   int n) {
  using Row = float[17];
  SHARED(Row, tile_a, 16);
  SHARED(Row, tile_b, 16);
  const int x = threadIdx.x, y = threadIdx.y, tiles = (n + 15) / 16;
  for (int tile = blockIdx.x; tile < tiles * tiles; tile += gridDim.x) {
    const int row = tile / tiles * 16 + y, column = tile % tiles * 16 + x;
    float sum = 0;
    for (int k = 0; k < n; k += 16) {
      tile_a[y][x] = row < n && k + x < n ? a[row * n + k + x] : 0.0f;
      tile_b[y][x] = k + y < n && column < n ? b[(k + y) * n + column] : 0.0f;
      __syncthreads();
      UNROLL_FOR(int j = 0; j < 16; ++j) sum = fmaf(tile_a[y][j], tile_b[j][x], sum);
      __syncthreads();
    }
    if (row < n && column < n) c[row * n + column] = sum;
  }
}

// out (9, 64): what two warps get from each warp operation
ENTRY_POINT(probe, warp_operations)(int* out) {
  const int t = threadIdx.x, lane = t % 32;
  out[0 * 64 + t] = __shfl_sync(FULL, t, 5);
  out[1 * 64 + t] = __shfl_sync(FULL, t, 3, 8);
  out[2 * 64 + t] = __shfl_up_sync(FULL, t, 2);
  out[3 * 64 + t] = __shfl_down_sync(FULL, t, 3, 16);
  out[4 * 64 + t] = __shfl_xor_sync(FULL, t, 7);
  out[5 * 64 + t] = static_cast<int>(__ballot_sync(FULL, lane % 3 == 0));
  out[6 * 64 + t] = __any_sync(FULL, t == 40) ? 1 : 0;
  out[7 * 64 + t] = __all_sync(FULL, t < 32) ? 1 : 0;
  // the halves of a warp on their own
  int half = t;
  if (lane < 16)
    half = __shfl_xor_sync(0x0000ffffu, t, 1);
  else
    half = __shfl_xor_sync(0xffff0000u, t, 2);
  __syncwarp();
  out[8 * 64 + t] = half;
}

ENTRY_POINT(probe, votes)(int* out) {
  const int t = threadIdx.x;
  const int count = __syncthreads_count(t % 5 == 0);
  const int any = __syncthreads_or(t == 17) ? 1 : 0;
  const int none = __syncthreads_or(t == 1000) ? 1 : 0;
  const int all = __syncthreads_and(t >= 0) ? 1 : 0;
  out[t] = count + 1000 * any + 10000 * none + 100000 * all;
}

ENTRY_POINT(probe, count_multiples)(int* out, int n) {
  SHARED(int, here, 1);
  if (threadIdx.x == 0) here[0] = 0;
  __syncthreads();
  for (int i : grid_range(n))
    if (i % 7 == 0) atomicAdd(&here[0], 1);
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(out, here[0]);
  atomicMax(out + 1, static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x));
  atomicMin(out + 2, -static_cast<int>(blockIdx.x));
}

// out[block] = sum over n floats of shared memory, more than a block has without asking
ENTRY_POINT(probe, sum_large)(float* out) {
  constexpr int N = 25000;
  SHARED(float, total, 1);
  SHARED_LARGE(float, many, N);
  for (int i : block_range(N)) many[i] = static_cast<float>(i % 5);
  __syncthreads();
  if (threadIdx.x == 0) {
    total[0] = 0.0f;
    for (int i = 0; i < N; ++i) total[0] += many[i];
    out[blockIdx.x] = total[0];
  }
}

template <int N>
__device__ float read_fours(const float* at) {
  float sum = 0;
  for (int i = 0; i < N; ++i) {
    const float4 four = reinterpret_cast<const float4*>(at)[i];
    sum += four.x + 2 * four.y + 3 * four.z + 4 * four.w;
  }
  return sum;
}

ENTRY_POINT_BOUNDED(probe, vectors, 32)(const float* source, float* out) {
  if (threadIdx.x == 0) out[0] = read_fours<2>(source);
}

// Only some threads come to the second barrier of a loop; threads of two kinds of work after a first barrier
ENTRY_POINT(probe, phases)(float* out, int rounds) {
  SHARED(float, board, 96);
  const int t = threadIdx.x;
  board[t] = static_cast<float>(t);
  for (int round = 0; round < rounds; ++round) {
    __syncthreads();
    const float left = board[(t + blockDim.x - 1) % blockDim.x];
    __syncthreads();
    board[t] = 0.5f * (board[t] + left);
  }
  out[blockIdx.x * blockDim.x + t] = board[t];
}

// values (n,): each becomes its left neighbour's, twice, plus one; next (n,)
ENTRY_POINT(probe, step_of_a_chain)(const float* values, float* next, int n) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  for (int i : grid_range(n)) next[i] = 2.0f * values[i == 0 ? n - 1 : i - 1] + 1.0f;
}
