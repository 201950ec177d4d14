// The rows of a product: positions of maps, each of which sees a window of a map, and how they lie in shared memory.
//
// A tile has M positions. Those of a window of the subsampling are neighbours, so that one tile has all of it:
// position = (image * CELLS + cell) * WINDOW + element. What its positions see are rows of the maps, which a block stages
// once, as vectors of eight channels: a term of the product is then a vector some pixels further, and nothing is computed
// for it (im2col without the copy). Images lie below each other, so a patch may reach from one into the next.
// UNFOLD: a pixel has the terms of one position instead of channels, as if the kernel were 1x1. That costs as many copies
// as there are terms, and saves the channels that fill up a vector: it is for layers of few channels.
#pragma once
#include "../../arithmetic.cuh"
#include "maps.cuh"

namespace graph {

// Calls store(i, load(i)) for every i < COUNT, shared out to the threads of a block. A thread has IN_FLIGHT loads on their
// way before it stores the first.
template <int THREADS, int COUNT, int IN_FLIGHT, class Load, class Store>
__device__ __forceinline__ void for_eights(Load load, Store store) {
#ifdef __CUDACC__
  for (int begin = threadIdx.x; begin < COUNT; begin += IN_FLIGHT * THREADS) {
    Eight eights[IN_FLIGHT];
    UNROLL_FOR(int n = 0; n < IN_FLIGHT; n++)
      eights[n] = begin + n * THREADS < COUNT ? load(begin + n * THREADS) : eight_zeros();
    UNROLL_FOR(int n = 0; n < IN_FLIGHT; n++)
      if (begin + n * THREADS < COUNT) store(begin + n * THREADS, eights[n]);
  }
#else
  for (int i : block_range(COUNT)) store(i, load(i));
#endif
}

// The `step`-th of a row's COUNT vectors that thread `own` stores, where neighbours' rows follow each other: eight neighbours
// begin with different ones where they would meet in a bank.
template <int COUNT>
__device__ __forceinline__ int first_of(int own, int step) {
  constexpr int MEETING = COUNT % 8 == 0 ? 8 : COUNT % 4 == 0 ? 4 : COUNT % 2 == 0 ? 2 : 1;
  return MEETING > 1 ? (step + own / (EIGHT / MEETING)) % COUNT : step;
}

// `Spec` has the sizes below; `Map` is one of maps.cuh.
template <class Spec>
struct Patch {
  using Map = typename Spec::Map;
  static constexpr int KERNEL_AREA = Spec::KERNEL_ROWS * Spec::KERNEL_COLUMNS;
  static constexpr int WINDOW = Spec::WINDOW_ROWS * Spec::WINDOW_COLUMNS;
  static constexpr int CELLS = Spec::CELL_ROWS * Spec::CELL_COLUMNS;
  static constexpr int USED = Spec::M / WINDOW * WINDOW;  // positions of a tile: whole windows
  static constexpr int CHANNELS = Map::CHANNELS * (Spec::UNFOLD ? KERNEL_AREA : 1);
  static constexpr int TAP_ROWS = Spec::UNFOLD ? 1 : Spec::KERNEL_ROWS;
  static constexpr int TAP_COLUMNS = Spec::UNFOLD ? 1 : Spec::KERNEL_COLUMNS;
  static constexpr int TAPS = TAP_ROWS * TAP_COLUMNS;
  static constexpr int GROUPS = (CHANNELS + EIGHT - 1) / EIGHT;       // of eight channels
  static constexpr int ROW = Spec::UNFOLD ? 0 : Spec::PATCH_COLUMNS;  // pixels from a row to the next
  static constexpr int PIXELS = Spec::UNFOLD ? Spec::M : Spec::PATCH_ROWS * Spec::PATCH_COLUMNS;
  static constexpr int STAGED_PIXELS = Spec::UNFOLD ? Spec::M : Spec::PATCH_ROWS * Map::COLUMNS;
  static constexpr int PITCH = PIXELS | 1;  // vectors from a group to the next: odd, so that they begin in other banks
  static constexpr bool ONE_PLACE = Map::ROWS == 1 && Map::COLUMNS == 1;  // channels are neighbours in memory

  // Where a position's window begins in the map, padding included.
  struct Place {
    int image, y, x;
  };

  static __device__ __forceinline__ Place place_of(int position) {
    const int cell = position / WINDOW, element = position % WINDOW;
    const int y = cell % CELLS / Spec::CELL_COLUMNS * Spec::WINDOW_ROWS + element / Spec::WINDOW_COLUMNS;
    const int x = cell % Spec::CELL_COLUMNS * Spec::WINDOW_COLUMNS + element % Spec::WINDOW_COLUMNS;
    return {cell / CELLS, y * Spec::STEP_ROWS, x * Spec::STEP_COLUMNS};
  }

  // The first row of the patch of the tile that begins at position `first`, over all images.
  static __device__ __forceinline__ int first_row(int first) {
    const Place place = place_of(first);
    return place.image * Map::ROWS + place.y;
  }

  // The pixel where position `first` + `row` begins. Rows beyond the last window see any pixel: nothing becomes of them.
  static __device__ __forceinline__ int pixel_of(int first, int row) {
    if (Spec::UNFOLD) return row;
    if (row >= USED) return 0;
    const Place place = place_of(first + row);
    return (place.image * Map::ROWS + place.y - first_row(first)) * ROW + place.x;
  }

  // A patch is staged in STAGED rows, those of channels 8 group, ...; this is how many vectors that takes.
  template <int STAGED>
  static constexpr int VECTORS = STAGED * STAGED_PIXELS;

  // Which pixel and which of the rows vector i is: neighbours in memory are neighbours among the threads.
  template <int STAGED>
  static __device__ __forceinline__ int pixel_of_vector(int i) {
    return ONE_PLACE ? i / STAGED : i % STAGED_PIXELS;
  }
  template <int STAGED>
  static __device__ __forceinline__ int row_of_vector(int i) {
    return ONE_PLACE ? i % STAGED : i / STAGED_PIXELS;
  }

  template <int STAGED>
  static __device__ __forceinline__ Eight load(const Map& map, int first, int group, int i) {
    const int pixel = pixel_of_vector<STAGED>(i), channel = (group + row_of_vector<STAGED>(i)) * EIGHT;
    if constexpr (Spec::UNFOLD) {
      Eight eight = eight_zeros();
      if (pixel >= USED) return eight;
      const Place place = place_of(first + pixel);
      UNROLL_FOR(int e = 0; e < EIGHT; e++) {
        const int term = channel + e, tap = term % KERNEL_AREA;
        if (term < CHANNELS)
          eight.at[e] = map.load_one(place.image, place.y + tap / Spec::KERNEL_COLUMNS,
                                     place.x + tap % Spec::KERNEL_COLUMNS, term / KERNEL_AREA);
      }
      return eight;
    } else {
      const int row = first_row(first) + pixel / Map::COLUMNS;
      return map.load(row / Map::ROWS, row % Map::ROWS, pixel % Map::COLUMNS, channel);
    }
  }

  // Writes vector i of a region of ROOM rows (ROOM, PITCH).
  template <int ARITHMETIC, int STAGED, int ROOM>
  static __device__ __forceinline__ void store(char* region, int i, const Eight& eight, float factor) {
    const int pixel = pixel_of_vector<STAGED>(i);
    const int at = Spec::UNFOLD ? pixel : pixel / Map::COLUMNS * ROW + pixel % Map::COLUMNS;
    Planes<ARITHMETIC>::store(region, ROOM * PITCH, row_of_vector<STAGED>(i) * PITCH + at, eight, factor);
  }
};

}  // namespace graph
