// Stage gemm_cuda, dropout: one kernel forward and one backward, which draw the same mask.
#pragma once
#include "../arithmetic.cuh"
#include "../dropout.cuh"

namespace gemm {

// source, target and their errors: (count, SIZE).
template <class Layer>
struct Dropout {
  static constexpr int SIZE = Layer::SIZE;
  static constexpr int BLOCKS = ceil_div(SIZE, 4);  // groups of four elements that share a random number

  // to[i] = from[i] * mask[i], where `from` is the source or the target's errors
  static __device__ __forceinline__ void mask(const float* __restrict__ from, float* __restrict__ to, Moment moment,
                                              int count) {
    if (!moment.training) {
      for (int i : grid_range(count * SIZE)) to[i] = from[i];
      return;
    }
    for (int i : grid_range(count * BLOCKS)) {
      const int image = i / BLOCKS, block = i % BLOCKS;
      const Words words = Mask<Layer>::words(moment, image, block);
      UNROLL_FOR(int n = 0; n < 4; n++) {
        const int element = block * 4 + n, at = image * SIZE + element;
        if (element < SIZE) to[at] = Mask<Layer>::keeps(words.at[n]) ? from[at] * Mask<Layer>::SCALE : 0.0f;
      }
    }
  }
};

}  // namespace gemm

#define GEMM_DROPOUT_KERNELS(layer)                                                                         \
  ENTRY_POINT(layer, drop)                                                                                  \
  (const float* __restrict__ source, float* __restrict__ target, int seed_low, int seed_high,               \
   const int* __restrict__ moment, int count) {                                                             \
    gemm::Dropout<layer>::mask(source, target, Moment(seed_low, seed_high, moment), count);                 \
  }                                                                                                         \
  ENTRY_POINT(layer, drop_backward)                                                                         \
  (const float* __restrict__ target_errors, float* __restrict__ source_errors, int seed_low, int seed_high, \
   const int* __restrict__ moment, int count) {                                                             \
    gemm::Dropout<layer>::mask(target_errors, source_errors, Moment(seed_low, seed_high, moment), count);   \
  }
