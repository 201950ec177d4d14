// Stage tuned: the gradient of convolutions, of which every block has left its own images' sum. Needs: BLOCK (threads).
#include "portable.cuh"

constexpr int CHUNK = 64;  // weights of a convolution that a block sums together

// The sum over all groups of `size` weights' gradients, from `first` on; partials (groups, PITCH). done(i, sum) for the
// i-th of them. shared: BLOCK floats.
template <int PITCH, class Done>
__device__ __forceinline__ void sum_chunk(const float* partials, int first, int size, int groups, float* shared,
                                          Done done) {
  constexpr int SHARES = BLOCK / CHUNK;
  const int share = threadIdx.x / CHUNK, i = threadIdx.x % CHUNK;
  float sum = 0.0f;
  if (i < size)
    for (int group = share; group < groups; group += SHARES)
      sum += fresh(partials + group * PITCH + first + i);
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (share == 0 && i < size) {
    for (int other = 1; other < SHARES; other++) sum += shared[other * CHUNK + i];
    done(i, sum);
  }
  __syncthreads();
}
