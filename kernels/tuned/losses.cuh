// The losses of stage tuned, and their derivatives by the logits.
#pragma once
#include "portable.cuh"

namespace tuned {

enum Loss { CROSS_ENTROPY, MEAN_SQUARED_ERROR };

// *at += value, where no other thread adds meanwhile; the thread does not wait for it.
__device__ __forceinline__ void red_add(float* at, float value) {
#ifdef __CUDACC__
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(at), "f"(value) : "memory");
#else
  *at += value;
#endif
}

// How many lanes have numbers of their own where there are so many: a power of two, at most a warp.
__host__ __device__ constexpr int lanes_for(int numbers) {
  int lanes = 1;
  while (lanes < numbers && lanes < 32) lanes *= 2;
  return lanes;
}

// errors = derivative of the batch's mean loss by the logits, share = 1 / images of the batch; one warp. The loss of
// the image is added to *loss.
template <int CLASSES>
__device__ __forceinline__ void softmax_cross_entropy(const float* logits, int label, float share, float* errors,
                                                      float* loss) {
  constexpr unsigned ALL = 0xffffffffu;
  constexpr int LANES = lanes_for(CLASSES);
  const int lane = threadIdx.x % LANES;  // the others do the same once more
  float largest = -INFINITY;
  for (int k = lane; k < CLASSES; k += LANES) largest = fmaxf(largest, logits[k]);
  for (int bit = LANES / 2; bit; bit /= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, bit));
  float sum = 0.0f, last = 0.0f;
  for (int k = lane; k < CLASSES; k += LANES) sum += last = expf(logits[k] - largest);
  for (int bit = LANES / 2; bit; bit /= 2) sum += __shfl_xor_sync(ALL, sum, bit);
  const float part = share / sum;
  for (int k = lane; k < CLASSES; k += LANES) {
    const float own = CLASSES <= LANES ? last : expf(logits[k] - largest);
    errors[k] = k == label ? own * part - share : own * part;
  }
  if (threadIdx.x % 32 == 0) red_add(loss, logf(sum) + largest - logits[label]);
}

// As above, for the mean over the classes of (logit - one-hot)^2.
template <int CLASSES>
__device__ __forceinline__ void mean_squared_error(const float* logits, int label, float share, float* errors,
                                                   float* loss) {
  constexpr unsigned ALL = 0xffffffffu;
  float sum = 0.0f;
  for (int k = threadIdx.x % 32; k < CLASSES; k += 32) {
    const float difference = logits[k] - (k == label ? 1.0f : 0.0f);
    sum = fmaf(difference, difference, sum);
    errors[k] = difference * (2.0f / float(CLASSES)) * share;
  }
  for (int bit = 16; bit; bit /= 2) sum += __shfl_xor_sync(ALL, sum, bit);
  if (threadIdx.x % 32 == 0) red_add(loss, sum / float(CLASSES));
}

}  // namespace tuned
