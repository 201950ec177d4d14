// Stage tuned: the gradient of convolutions, of which every block has left its own images' sum. Needs: BLOCK (threads).
#include "portable.cuh"

constexpr int CHUNK = 64;  // weights of a convolution that a block sums together

// The sum over all groups of `size` weights' gradients, from `first` on; partials (groups, PITCH). weights.fetch(i) is
// what there is of the i-th of them, weights.change(i, that, gradient) changes it. shared: BLOCK floats.
template <int PITCH, class Weights>
__device__ __forceinline__ void sum_chunk(const float* partials, int first, int size, int groups, float* shared,
                                          Weights weights) {
  constexpr int SHARES = BLOCK / CHUNK;
  const int share = threadIdx.x / CHUNK, i = threadIdx.x % CHUNK;
  decltype(weights.fetch(0)) now;
  if (share == 0 && i < size) now = weights.fetch(i);
  float sum = 0.0f;
  if (i < size) {
#pragma unroll 8
    for (int group = share; group < groups; group += SHARES) sum += load_l2(partials + group * PITCH + first + i);
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (share == 0 && i < size) {
    for (int other = 1; other < SHARES; other++) sum += shared[other * CHUNK + i];
    weights.change(i, now, sum);
  }
  __syncthreads();
}
