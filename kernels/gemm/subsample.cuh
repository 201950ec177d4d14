// Stage gemm_cuda, subsampling: one kernel forward and one backward.
#pragma once
#include "../layers.cuh"

namespace gemm {

// source (count, CHANNELS, HEIGHT, WIDTH), target (count, CHANNELS, ROWS, COLUMNS).
template <class Layer>
struct Subsample {
  static constexpr int CHANNELS = Layer::CHANNELS, HEIGHT = Layer::HEIGHT, WIDTH = Layer::WIDTH;
  static constexpr int ROWS = Layer::ROWS, COLUMNS = Layer::COLUMNS, METHOD = Layer::METHOD;
  static constexpr int WINDOW_ROWS = Layer::WINDOW_ROWS, WINDOW_COLUMNS = Layer::WINDOW_COLUMNS;
  static constexpr int ROW_STRIDE = Layer::ROW_STRIDE, COLUMN_STRIDE = Layer::COLUMN_STRIDE;
  static constexpr int ROW_PADDING = Layer::ROW_PADDING, COLUMN_PADDING = Layer::COLUMN_PADDING;
  static constexpr bool TILED = Layer::TILED;  // every element of the source is in exactly one window
  static_assert(!TILED || (ROW_STRIDE == WINDOW_ROWS && COLUMN_STRIDE == WINDOW_COLUMNS), "windows lie side by side");
  static_assert(!TILED || (ROW_PADDING == 0 && COLUMN_PADDING == 0), "no window reaches beyond the map");
  static_assert(!TILED || (HEIGHT == ROWS * WINDOW_ROWS && WIDTH == COLUMNS * WINDOW_COLUMNS), "windows fill the map");

  // A window: its upper left corner is element `start` of all source maps, or would be if the source had the padding.
  // Rows [top, bottom) and columns [left, right), counted from there, lie in the source.
  struct Window {
    int start, top, bottom, left, right;
  };

  // The window of a target element; map = image * CHANNELS + channel.
  static __device__ __forceinline__ Window window_of(int map, int y, int x) {
    const int row = y * ROW_STRIDE - ROW_PADDING, column = x * COLUMN_STRIDE - COLUMN_PADDING;
    Window window = {(map * HEIGHT + row) * WIDTH + column, 0, WINDOW_ROWS, 0, WINDOW_COLUMNS};
    if (ROW_PADDING > 0) {
      window.top = max(0, -row);
      window.bottom = min(WINDOW_ROWS, HEIGHT - row);
    }
    if (COLUMN_PADDING > 0) {
      window.left = max(0, -column);
      window.right = min(WINDOW_COLUMNS, WIDTH - column);
    }
    return window;
  }

  static __device__ __forceinline__ Window window_of(int i) {
    return window_of(i / (COLUMNS * ROWS), i / COLUMNS % ROWS, i % COLUMNS);
  }

  // Calls f(place in the source maps) for the window's elements in the source, in reading order.
  template <class F>
  static __device__ __forceinline__ void for_each(const Window& window, F f) {
    for (int a = window.top; a < window.bottom; a++)
      for (int b = window.left; b < window.right; b++) f(window.start + a * WIDTH + b);
  }

  // Place of the window's largest element; the first of equals in reading order.
  static __device__ __forceinline__ int winner(const float* __restrict__ source, const Window& window) {
    int best = window.start + window.top * WIDTH + window.left;
    for_each(window, [&](int at) {
      // a NaN wins and stays: otherwise a diverged run would hide behind its neighbours
      if (source[at] > source[best] || (source[at] != source[at] && source[best] == source[best])) best = at;
    });
    return best;
  }

  // The share of a window's error that each of its elements gets for the mean; padding counts as zeros.
  static __device__ __forceinline__ float share(float error) { return error / float(WINDOW_ROWS * WINDOW_COLUMNS); }

  static __device__ __forceinline__ void forward(const float* __restrict__ source, float* __restrict__ target,
                                                 int count) {
    const int total = count * CHANNELS * ROWS * COLUMNS;
    for (int i : grid_range(total)) {
      const Window window = window_of(i);
      if (METHOD == MAX) {
        target[i] = source[winner(source, window)];
      } else {
        float sum = 0.0f;
        for_each(window, [&](int at) { sum += source[at]; });
        target[i] = share(sum);
      }
    }
  }

  static __device__ __forceinline__ void backward(const float* __restrict__ source,
                                                  const float* __restrict__ target_errors,
                                                  float* __restrict__ source_errors, int count) {
    if (TILED)
      scatter(source, target_errors, source_errors, count);
    else
      gather(source, target_errors, source_errors, count);
  }

  // Each window writes the errors of its elements.
  static __device__ __forceinline__ void scatter(const float* __restrict__ source,
                                                 const float* __restrict__ target_errors,
                                                 float* __restrict__ source_errors, int count) {
    const int total = count * CHANNELS * ROWS * COLUMNS;
    for (int i : grid_range(total)) {
      const Window window = window_of(i);
      const int best = METHOD == MAX ? winner(source, window) : 0;
      for_each(window, [&](int at) {
        source_errors[at] = METHOD == MAX ? (at == best ? target_errors[i] : 0.0f) : share(target_errors[i]);
      });
    }
  }

  // Each element of the source adds up the errors of the windows that it is in, always in the same order. The winner of
  // each is found again, which costs comparisons but no memory.
  static __device__ __forceinline__ void gather(const float* __restrict__ source,
                                                const float* __restrict__ target_errors,
                                                float* __restrict__ source_errors, int count) {
    const int total = count * CHANNELS * HEIGHT * WIDTH;
    for (int i : grid_range(total)) {
      const int map = i / (WIDTH * HEIGHT), y = i / WIDTH % HEIGHT + ROW_PADDING, x = i % WIDTH + COLUMN_PADDING;
      const int last_row = min(ROWS - 1, y / ROW_STRIDE), last_column = min(COLUMNS - 1, x / COLUMN_STRIDE);
      float sum = 0.0f;
      for (int row = first_window(y, WINDOW_ROWS, ROW_STRIDE); row <= last_row; row++)
        for (int column = first_window(x, WINDOW_COLUMNS, COLUMN_STRIDE); column <= last_column; column++) {
          const float error = target_errors[(map * ROWS + row) * COLUMNS + column];
          if (METHOD == MEAN)
            sum += share(error);
          else if (winner(source, window_of(map, row, column)) == i)
            sum += error;
        }
      source_errors[i] = sum;
    }
  }

  // The first of the windows that end behind this position of the padded source.
  static __device__ __forceinline__ int first_window(int position, int size, int stride) {
    return position < size ? 0 : (position - size) / stride + 1;
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
