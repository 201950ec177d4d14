// Stage gemm_cuda, subsampling: one kernel forward and one backward.
#pragma once
#include "../layers.cuh"

namespace gemm {

// source (count, CHANNELS, ROWS * WINDOW, COLUMNS * WINDOW), target (count, CHANNELS, ROWS, COLUMNS).
template <class Layer>
struct Subsample {
  static constexpr int CHANNELS = Layer::CHANNELS, ROWS = Layer::ROWS, COLUMNS = Layer::COLUMNS;
  static constexpr int WINDOW = Layer::WINDOW, METHOD = Layer::METHOD;
  static constexpr int SOURCE_COLUMNS = COLUMNS * WINDOW;

  // First source element of the window of target element i; windows lie in one channel.
  static __device__ __forceinline__ int window_start(int i) {
    const int x = i % COLUMNS, y = i / COLUMNS % ROWS, maps = i / (COLUMNS * ROWS);
    return (maps * ROWS * WINDOW + y * WINDOW) * SOURCE_COLUMNS + x * WINDOW;
  }

  // Offset of the largest element from the window's first; the first of equals in reading order.
  static __device__ __forceinline__ int winner(const float* window) {
    int best = 0;
    for (int a = 0; a < WINDOW; a++)
      for (int b = 0; b < WINDOW; b++) {
        const int at = a * SOURCE_COLUMNS + b;
        // a NaN wins and stays: otherwise a diverged run would hide behind its neighbours
        if (window[at] > window[best] || (window[at] != window[at] && window[best] == window[best])) best = at;
      }
    return best;
  }

  static __device__ __forceinline__ void forward(const float* __restrict__ source, float* __restrict__ target,
                                                 int count) {
    const int total = count * CHANNELS * ROWS * COLUMNS;
    for (int i : grid_range(total)) {
      const float* window = source + window_start(i);
      if (METHOD == MAX) {
        target[i] = window[winner(window)];
      } else {
        float sum = 0.0f;
        for (int a = 0; a < WINDOW; a++)
          for (int b = 0; b < WINDOW; b++) sum += window[a * SOURCE_COLUMNS + b];
        target[i] = sum / float(WINDOW * WINDOW);
      }
    }
  }

  static __device__ __forceinline__ void backward(const float* __restrict__ source,
                                                  const float* __restrict__ target_errors,
                                                  float* __restrict__ source_errors, int count) {
    const int total = count * CHANNELS * ROWS * COLUMNS;
    for (int i : grid_range(total)) {
      const int start = window_start(i);
      const int best = METHOD == MAX ? winner(source + start) : 0;
      for (int a = 0; a < WINDOW; a++)
        for (int b = 0; b < WINDOW; b++) {
          const int at = a * SOURCE_COLUMNS + b;
          source_errors[start + at] =
              METHOD == MAX ? (at == best ? target_errors[i] : 0.0f) : target_errors[i] / float(WINDOW * WINDOW);
        }
    }
  }
};

}  // namespace gemm

#define GEMM_SUBSAMPLE_KERNELS(layer)                                                                            \
  ENTRY_POINT(layer, subsample)(const float* __restrict__ source, float* __restrict__ target, int count) {       \
    gemm::Subsample<layer>::forward(source, target, count);                                                      \
  }                                                                                                              \
  ENTRY_POINT(layer, subsample_backward)                                                                         \
  (const float* __restrict__ source, const float* __restrict__ target_errors, float* __restrict__ source_errors, \
   int count) {                                                                                                  \
    gemm::Subsample<layer>::backward(source, target_errors, source_errors, count);                               \
  }
