// Patches of spread errors (SpreadErrors) where the positions of a window of the subsampling lie side by side.
//
// A thread has a window: it loads and splits once what all positions share, and stores it at each of them. What lies between
// and around the windows is not stored, so that a patch has to be cleared before its first chunk.
#pragma once
#include "patch.cuh"

namespace graph {

// Left: a Patch of SpreadErrors, of which CHUNK groups are staged.
template <class Left, int CHUNK>
struct ErrorCells {
  using Map = typename Left::Map;
  using Errors = typename Map::Errors;
  static constexpr int WINDOW_ROWS = Errors::WINDOW_ROWS, WINDOW_COLUMNS = Errors::WINDOW_COLUMNS;
  static constexpr int CELL_ROWS = Errors::CELL_ROWS, CELL_COLUMNS = Errors::CELL_COLUMNS;
  static constexpr int PATCH_ROWS = Left::PIXELS / Left::ROW;
  // Rows of windows that a patch may meet.
  static constexpr int HIGH = (PATCH_ROWS + WINDOW_ROWS - 2) / WINDOW_ROWS + 1;
  static constexpr int VECTORS = CHUNK * Left::PITCH;

  // P: the Planes that vectors are stored as, here and below.
  template <class P>
  static __device__ __forceinline__ void clear(char* region) {
    for (int i : block_range(VECTORS)) P::store(region, VECTORS, i, eight_zeros(), 1.0f);
  }

  // Stages groups `group`, ... of the patch of the tile that begins at position `first`.
  template <class P>
  static __device__ __forceinline__ void stage(char* region, const Map& map, int first, int group, float factor) {
    const int top = Left::first_row(first), y = top % Map::ROWS - Map::ABOVE;
    const int first_row = top / Map::ROWS * CELL_ROWS + min(max(y, 0) / WINDOW_ROWS, CELL_ROWS);
    for (int i : block_range(CHUNK * HIGH * CELL_COLUMNS)) {
      const int column = i % CELL_COLUMNS, row = first_row + i / CELL_COLUMNS % HIGH, own = i / CELL_COLUMNS / HIGH;
      const int image = row / CELL_ROWS, channel = (group + own) * EIGHT;
      if (image >= map.of.count) continue;
      const int at = Errors::cell(image, channel, row % CELL_ROWS, column);
      int winner[EIGHT];
      map.of.load_winners(winner, at, channel);
      const auto words = P::words_of(map.of.load_cells(at, channel), factor);
      const int patch_row = image * Map::ROWS + Map::ABOVE + row % CELL_ROWS * WINDOW_ROWS - top;
      UNROLL_FOR(int y = 0; y < WINDOW_ROWS; y++) {
        if (patch_row + y < 0 || patch_row + y >= PATCH_ROWS) continue;
        const int pixel = own * Left::PITCH + (patch_row + y) * Left::ROW + Map::LEFT + column * WINDOW_COLUMNS;
        UNROLL_FOR(int step = 0; step < WINDOW_COLUMNS; step++) {
          const int x = first_of<WINDOW_COLUMNS>(column, step);
          P::store(region, VECTORS, pixel + x, Errors::share(words, winner, y * WINDOW_COLUMNS + x));
        }
      }
    }
  }
};

}  // namespace graph
