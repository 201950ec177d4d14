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

  // The part of a window that lies in the source: `rows` rows of `columns` elements; the first is element `start` of all
  // source maps.
  struct Window {
    int start, rows, columns;
  };

  // The window of a target element; map = image * CHANNELS + channel.
  static __device__ __forceinline__ Window window_of(int map, int y, int x) {
    int row = y * ROW_STRIDE, column = x * COLUMN_STRIDE, rows = WINDOW_ROWS, columns = WINDOW_COLUMNS;
    if (ROW_PADDING > 0) clip(row, rows, ROW_PADDING, HEIGHT);
    if (COLUMN_PADDING > 0) clip(column, columns, COLUMN_PADDING, WIDTH);
    return {(map * HEIGHT + row) * WIDTH + column, rows, columns};
  }

  static __device__ __forceinline__ Window window_of(int i) {
    return window_of(i / (COLUMNS * ROWS), i / COLUMNS % ROWS, i % COLUMNS);
  }

  // `size` positions of the padded source from `first` on become those of the source that are among them.
  static __device__ __forceinline__ void clip(int& first, int& size, int padding, int length) {
    const int end = min(length, first - padding + size);
    first = max(0, first - padding);
    size = end - first;
  }

  // Offset of the largest element from the window's first; the first of equals in reading order.
  static __device__ __forceinline__ int winner(const float* window, int rows, int columns) {
    int best = 0;
    for (int a = 0; a < rows; a++)
      for (int b = 0; b < columns; b++) {
        const int at = a * WIDTH + b;
        // a NaN wins and stays: otherwise a diverged run would hide behind its neighbours
        if (window[at] > window[best] || (window[at] != window[at] && window[best] == window[best])) best = at;
      }
    return best;
  }

  // The share of a window's error that each of its elements gets for the mean; padding counts as zeros.
  static __device__ __forceinline__ float share(float error) {
    return error / (float(WINDOW_ROWS) * float(WINDOW_COLUMNS));
  }

  static __device__ __forceinline__ void forward(const float* __restrict__ source, float* __restrict__ target,
                                                 int count) {
    const int total = count * CHANNELS * ROWS * COLUMNS;
    for (int i : grid_range(total)) {
      const auto [start, rows, columns] = window_of(i);
      const float* window = source + start;
      if (METHOD == MAX) {
        target[i] = window[winner(window, rows, columns)];
      } else {
        float sum = 0.0f;
        for (int a = 0; a < rows; a++)
          for (int b = 0; b < columns; b++) sum += window[a * WIDTH + b];
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
      const int start = window_of(i).start;
      const int best = METHOD == MAX ? winner(source + start, WINDOW_ROWS, WINDOW_COLUMNS) : 0;
      for (int a = 0; a < WINDOW_ROWS; a++)
        for (int b = 0; b < WINDOW_COLUMNS; b++) {
          const int at = a * WIDTH + b;
          source_errors[start + at] = METHOD == MAX ? (at == best ? target_errors[i] : 0.0f) : share(target_errors[i]);
        }
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
          if (METHOD == MEAN) {
            sum += share(error);
          } else {
            const auto [start, rows, columns] = window_of(map, row, column);
            if (start + winner(source + start, rows, columns) == i) sum += error;
          }
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
