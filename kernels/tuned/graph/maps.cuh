// What the products of plan `graph` read: maps with the padding around them, and the errors of a convolution's sums, which
// are nowhere in memory. Each kind of map gives eight neighbouring channels at a place, and zeros where nothing is.
#pragma once
#include "planes.cuh"

namespace graph {

__device__ __forceinline__ Eight eight_zeros() { return {{0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f}}; }

// The numbers from[0], from[STEP], ..., of which the first `there` exist; `VECTORS`: they are neighbours at multiples of
// 16 bytes, and exist by fours.
template <int STEP, bool VECTORS>
__device__ __forceinline__ Eight load_eight(const float* __restrict__ from, int there) {
  Eight eight = eight_zeros();
  if constexpr (VECTORS) {
    UNROLL_FOR(int half = 0; half < 2; half++)
      if (half * 4 < there) {
        const Float4 four = *(reinterpret_cast<const Float4*>(from) + half);
        UNROLL_FOR(int e = 0; e < 4; e++) eight.at[half * 4 + e] = four.at[e];
      }
  } else if (there >= EIGHT) {
    UNROLL_FOR(int e = 0; e < EIGHT; e++) eight.at[e] = from[e * STEP];
  } else {
    UNROLL_FOR(int e = 0; e < EIGHT; e++)
      if (e < there) eight.at[e] = from[e * STEP];
  }
  return eight;
}

// The layer's source with its padding. `Layer` is the struct of a layer's sizes, as everywhere below.
template <class Layer>
struct PaddedSource {
  static constexpr int CHANNELS = Layer::CHANNELS, HEIGHT = Layer::HEIGHT, WIDTH = Layer::WIDTH;
  static constexpr int PADDING_ROWS = Layer::PADDING_ROWS, PADDING_COLUMNS = Layer::PADDING_COLUMNS;
  static constexpr int ROWS = HEIGHT + 2 * PADDING_ROWS, COLUMNS = WIDTH + 2 * PADDING_COLUMNS;
  static constexpr int AREA = HEIGHT * WIDTH;
  static constexpr bool WHOLE_WINDOWS = false;  // of errors

  const float* values;  // (count, CHANNELS, HEIGHT, WIDTH)
  int count;

  // The index of a place in the first channel, or -1 where there is padding or no image.
  __device__ __forceinline__ int place(int image, int y, int x) const {
    y -= PADDING_ROWS, x -= PADDING_COLUMNS;
    const bool inside = (PADDING_ROWS == 0 || static_cast<unsigned>(y) < static_cast<unsigned>(HEIGHT)) &&
                        (PADDING_COLUMNS == 0 || static_cast<unsigned>(x) < static_cast<unsigned>(WIDTH));
    return inside && image < count ? (image * CHANNELS * HEIGHT + y) * WIDTH + x : -1;
  }

  __device__ __forceinline__ Eight load(int image, int y, int x, int channel) const {
    const int at = place(image, y, x);
    if (at < 0) return eight_zeros();
    return load_eight < AREA, AREA == 1 && CHANNELS % 4 == 0 > (values + at + channel * AREA, CHANNELS - channel);
  }

  __device__ __forceinline__ float load_one(int image, int y, int x, int channel) const {
    const int at = place(image, y, x);
    return at < 0 ? 0.0f : values[at + channel * AREA];
  }
};

// Errors of the convolution's sums at the positions that a window covers; at all others they are zero. They are made of
// those of the subsampled target whenever they are needed: an error times the slope of the activation goes to its window's
// winner, or in equal shares to all of a mean, and nowhere if dropout dropped the window's value.
template <class Layer>
struct SumErrors {
  static constexpr int MAPS = Layer::MAPS, CELL_ROWS = Layer::OUT_ROWS, CELL_COLUMNS = Layer::OUT_COLUMNS;
  static constexpr int WINDOW_ROWS = Layer::WINDOW_ROWS, WINDOW_COLUMNS = Layer::WINDOW_COLUMNS;
  static constexpr int WINDOW = WINDOW_ROWS * WINDOW_COLUMNS, CELLS = CELL_ROWS * CELL_COLUMNS;
  static constexpr int ROWS = CELL_ROWS * WINDOW_ROWS, COLUMNS = CELL_COLUMNS * WINDOW_COLUMNS;
  static constexpr int SIZE = MAPS * CELLS;  // of an image's target
  static constexpr bool MAXIMUM = WINDOW > 1 && Layer::METHOD == MAX, DROPS = Layer::DROPS;
  static constexpr bool HAS_WINNERS = MAXIMUM || DROPS;
  static constexpr int DROPPED = 255;  // in place of a winner: dropout made the window's value 0
  static constexpr bool VECTORS = CELLS == 1 && MAPS % 4 == 0;

  const float* errors;           // (count, MAPS, CELL_ROWS, CELL_COLUMNS), of the target
  const float* target;           // likewise; used where there is an activation
  const unsigned char* winners;  // likewise; used for a maximum over windows, and where there is dropout
  int count;

  // The index of a window (a cell of the target) in a map.
  static __device__ __forceinline__ int cell(int image, int map, int row, int column) {
    return ((image * MAPS + map) * CELL_ROWS + row) * CELL_COLUMNS + column;
  }

  // The errors of eight neighbouring maps' windows as a whole; `at` is the first one's cell.
  __device__ __forceinline__ Eight load_cells(int at, int map) const {
    Eight eight = load_eight<CELLS, VECTORS>(errors + at, MAPS - map);
    if constexpr (Layer::FUNCTION != IDENTITY) {
      const Eight values = load_eight<CELLS, VECTORS>(target + at, MAPS - map);
      UNROLL_FOR(int e = 0; e < EIGHT; e++) eight.at[e] *= slope_of(values.at[e]);
    }
    if constexpr (DROPS)
      UNROLL_FOR(int e = 0; e < EIGHT; e++) eight.at[e] *= Layer::SCALE;
    if constexpr (WINDOW > 1 && Layer::METHOD == MEAN)
      UNROLL_FOR(int e = 0; e < EIGHT; e++) eight.at[e] /= float(WINDOW);
    return eight;
  }

  // The winners of these windows, one each.
  __device__ __forceinline__ void load_winners(int (&winner)[EIGHT], int at, int map) const {
    UNROLL_FOR(int e = 0; e < EIGHT; e++)
      if constexpr (HAS_WINNERS) winner[e] = map + e < MAPS ? winners[at + e * CELLS] : 0;
  }

  // What element `element` of these windows gets of their errors.
  static __device__ __forceinline__ Eight share(const Eight& cells, const int (&winner)[EIGHT], int element) {
    Eight eight = cells;
    if constexpr (HAS_WINNERS)
      UNROLL_FOR(int e = 0; e < EIGHT; e++) eight.at[e] = gets(winner[e], element) ? cells.at[e] : 0.0f;
    return eight;
  }

  // The same as words: numbers are split once for all elements.
  template <class Words>
  static __device__ __forceinline__ Words share(const Words& cells, const int (&winner)[EIGHT], int element) {
    if constexpr (!HAS_WINNERS) return cells;
    bool keeps[EIGHT];
    UNROLL_FOR(int e = 0; e < EIGHT; e++) keeps[e] = gets(winner[e], element);
    return cells.kept(keeps);
  }

  static __device__ __forceinline__ bool gets(int winner, int element) {
    return MAXIMUM ? winner == element : winner != DROPPED;
  }

  // The slope of the activation where the target is `value`: what dropout kept has become larger after it.
  static __device__ __forceinline__ float slope_of(float value) {
    if constexpr (DROPS) value *= 1.0f / Layer::SCALE;
    return slope<Layer::FUNCTION>(value);
  }

  // Of maps `map`, ..., `map` + 7 at position (y, x), both below ROWS and COLUMNS.
  __device__ __forceinline__ Eight load(int image, int y, int x, int map) const {
    const int at = cell(image, map, y / WINDOW_ROWS, x / WINDOW_COLUMNS);
    int winner[EIGHT];
    load_winners(winner, at, map);
    return share(load_cells(at, map), winner, y % WINDOW_ROWS * WINDOW_COLUMNS + x % WINDOW_COLUMNS);
  }

  __device__ __forceinline__ float load_one(int image, int y, int x, int map) const {
    const int at = cell(image, map, y / WINDOW_ROWS, x / WINDOW_COLUMNS);
    if constexpr (HAS_WINNERS)
      if (!gets(winners[at], y % WINDOW_ROWS * WINDOW_COLUMNS + x % WINDOW_COLUMNS)) return 0.0f;
    float error = errors[at];
    if constexpr (Layer::FUNCTION != IDENTITY) error *= slope_of(target[at]);
    if constexpr (DROPS) error *= Layer::SCALE;
    return WINDOW > 1 && Layer::METHOD == MEAN ? error / float(WINDOW) : error;
  }
};

// The same errors as far apart as the windows that they belong to, and so far from the border that a convolution of them
// with the kernel turned around is that of the source: place (y, x) has the error of the position that lies KERNEL - 1
// rows and columns above and left of it, in the padded source.
template <class Layer>
struct SpreadErrors {
  static constexpr int CHANNELS = Layer::MAPS;
  static constexpr int ROWS = Layer::HEIGHT + Layer::KERNEL_ROWS - 1,
                       COLUMNS = Layer::WIDTH + Layer::KERNEL_COLUMNS - 1;
  static constexpr int ABOVE = Layer::KERNEL_ROWS - 1 - Layer::PADDING_ROWS;
  static constexpr int LEFT = Layer::KERNEL_COLUMNS - 1 - Layer::PADDING_COLUMNS;
  using Errors = SumErrors<Layer>;
  static constexpr int AREA = Errors::CELLS;
  // Whether the positions of a window lie side by side, and all within the map.
  static constexpr bool WHOLE_WINDOWS =
      Errors::WINDOW > 1 && Layer::STRIDE_ROWS == 1 && Layer::STRIDE_COLUMNS == 1 && ABOVE >= 0 && LEFT >= 0;

  Errors of;

  // Whether a position has its window's corner at y of the padded source; y becomes its number.
  template <int STRIDE, int POSITIONS>
  static __device__ __forceinline__ bool meets(int& y) {
    if (y < 0 || y % STRIDE != 0) return false;
    y /= STRIDE;
    return y < POSITIONS;
  }

  __device__ __forceinline__ bool find(int image, int& y, int& x) const {
    y -= ABOVE, x -= LEFT;
    return image < of.count && meets<Layer::STRIDE_ROWS, Errors::ROWS>(y) &&
           meets<Layer::STRIDE_COLUMNS, Errors::COLUMNS>(x);
  }

  __device__ __forceinline__ Eight load(int image, int y, int x, int map) const {
    return find(image, y, x) ? of.load(image, y, x, map) : eight_zeros();
  }

  __device__ __forceinline__ float load_one(int image, int y, int x, int map) const {
    return find(image, y, x) ? of.load_one(image, y, x, map) : 0.0f;
  }
};

}  // namespace graph
