// Plan `graph` of stage tuned, the gradient of a layer's weights: target errors x source, summed over positions.
//
// A row of the product is a map, a column a channel and a tap, and its terms are the positions. Both sides lie in shared
// memory as they do in product.cuh, eight maps or channels a vector, and matrices are transposed when they are loaded.
// One more tile of columns has a 1 in its first one, by which the gradient of the bias comes about. A block sums over a
// slice of the positions, and leaves one of several partial sums.
#pragma once
#include "product.cuh"

namespace graph {

template <class Layer>
struct GradientSpec {
  using Map = PaddedSource<Layer>;
  static constexpr int M = Layer::GRADIENT_POSITIONS;  // of a chunk; the rows of a patch
  static constexpr int PATCH_ROWS = Layer::GRADIENT_PATCH_ROWS, PATCH_COLUMNS = Layer::GRADIENT_PATCH_COLUMNS;
  static constexpr bool UNFOLD = Layer::GRADIENT_UNFOLD;
  static constexpr int KERNEL_ROWS = Layer::KERNEL_ROWS, KERNEL_COLUMNS = Layer::KERNEL_COLUMNS;
  static constexpr int STEP_ROWS = Layer::STRIDE_ROWS, STEP_COLUMNS = Layer::STRIDE_COLUMNS;
  static constexpr int WINDOW_ROWS = Layer::WINDOW_ROWS, WINDOW_COLUMNS = Layer::WINDOW_COLUMNS;
  static constexpr int CELL_ROWS = Layer::OUT_ROWS, CELL_COLUMNS = Layer::OUT_COLUMNS;
};

template <class Layer>
struct Gradient {
  static constexpr int ARITHMETIC = made_of(Layer::ARITHMETIC), THREADS = Layer::THREADS;
  using P = Planes<ARITHMETIC>;
  using Right = Patch<GradientSpec<Layer>>;
  static constexpr int MAPS = Layer::MAPS, TERMS = Layer::CHANNELS * Layer::KERNEL_ROWS * Layer::KERNEL_COLUMNS;
  static constexpr int PARAMETERS = Layer::PARAMETERS;
  static_assert(PARAMETERS == MAPS * TERMS + MAPS, "a partial sum has the gradients of weights and biases");

  static constexpr int M = Layer::GRADIENT_M, WARPS_M = Layer::GRADIENT_WARPS_M;  // maps of a tile
  static constexpr int WARPS_N = THREADS / WARP / WARPS_M, M_TILES = M / 16 / WARPS_M;
  static_assert(M_TILES * 16 * WARPS_M == M, "warps share out the maps");
  static constexpr int GROUPS = Layer::GRADIENT_GROUPS;  // of eight channels, in a tile
  static constexpr int COLUMN_TILES = Right::TAPS * GROUPS + 1, N_TILES = ceil_div(COLUMN_TILES, WARPS_N);
  static constexpr int POSITIONS = Layer::GRADIENT_POSITIONS;
  static_assert(POSITIONS % K_STEP == 0, "a step multiplies the terms of two vectors");

  // Shared memory: the pixel of each position, the errors (M / 8, LEFT_PITCH), the patch (GROUPS + 1, PITCH).
  static constexpr int LEFT_PITCH = POSITIONS + 1, LEFT_VECTORS = M / EIGHT * LEFT_PITCH;
  static constexpr int RIGHT_VECTORS = (GROUPS + 1) * Right::PITCH;
  static constexpr int LEFT_BYTES = LEFT_VECTORS * P::COUNT * P::VECTOR_BYTES;
  static constexpr int STAGED_BYTES = LEFT_BYTES + RIGHT_VECTORS * P::COUNT * P::VECTOR_BYTES;
  // Where a map's weights are not in the order of a tile's columns, sums go to device memory by way of what is staged: as
  // single numbers they would take a write of 32 bytes each.
  static constexpr bool REORDERS = Right::TAPS > 1;
  static constexpr int WEIGHTS = GROUPS * EIGHT * Right::TAPS, SUM_PITCH = WEIGHTS + 1;  // of a map in a tile
  static constexpr int SUM_BYTES = REORDERS ? M * SUM_PITCH * 4 : 0;
  static constexpr int BYTES = POSITIONS * 4 + larger_of(STAGED_BYTES, SUM_BYTES);

  static constexpr int WIDE = ceil_div(Right::GROUPS, GROUPS), HIGH = ceil_div(MAPS, M);

  static __device__ __forceinline__ int jobs(int groups) { return groups * WIDE * HIGH; }

  // partials (groups, PARAMETERS).
  static __device__ __forceinline__ void run(char* memory, const SumErrors<Layer>& errors,
                                             const float* __restrict__ source, float* __restrict__ partials,
                                             float factor, int count, int groups) {
    int* pixels = reinterpret_cast<int*>(memory);
    char* left = memory + POSITIONS * 4;
    char* right = left + LEFT_BYTES;
    const PaddedSource<Layer> map = {source, count};
    const float back = ARITHMETIC == F16X3 ? 1.0f / factor / Range::MAPS : 1.0f;
    const int warp = threadIdx.x / WARP, tile0 = warp / WARPS_M * N_TILES, row0 = warp % WARPS_M * M_TILES * 16;
    const int chunks = ceil_div(count * Right::CELLS * Right::WINDOW, Right::USED);
    for (int job = blockIdx.x; job < jobs(groups); job += gridDim.x) {
      const int group = job / (WIDE * HIGH), map0 = job / WIDE % HIGH * M, channel_group = job % WIDE * GROUPS;
      Sums<ARITHMETIC, M_TILES, N_TILES> sums;
      sums.set_zero();
      stage_ones(right);
      for (int chunk = start_of_group(group, groups, chunks); chunk < start_of_group(group + 1, groups, chunks);
           chunk++) {
        const int first = chunk * Right::USED;
        __syncthreads();
        for (int row : block_range(POSITIONS)) pixels[row] = Right::pixel_of(first, row);
        stage_errors(left, errors, first, map0, factor);
        for_eights<THREADS, Right::template VECTORS<GROUPS>, Layer::GRADIENT_UNFOLD ? 2 : 4>(
            [&](int i) { return Right::template load<GROUPS>(map, first, channel_group, i); },
            [&](int i, const Eight& eight) {
              Right::template store<ARITHMETIC, GROUPS, GROUPS + 1>(right, i, eight, Range::MAPS);
            });
        __syncthreads();
        multiply(sums, pixels, left, right, row0, tile0);
      }
      __syncthreads();
      leave(sums, reinterpret_cast<float*>(left), partials + group * PARAMETERS, map0, channel_group, row0, tile0,
            back);
      __syncthreads();
    }
  }

  // The vector where column tile `tile` begins in the patch; one beyond the last is that of the biases again.
  static __device__ __forceinline__ int start_of_tile(int tile) {
    const int tap = tile / GROUPS;
    if (tile >= COLUMN_TILES - 1) return GROUPS * Right::PITCH;
    return tile % GROUPS * Right::PITCH + tap / Right::TAP_COLUMNS * Right::ROW + tap % Right::TAP_COLUMNS;
  }

  // Adds the products of a chunk's positions to sums; what position k sees begins at pixels[k].
  static __device__ __forceinline__ void multiply(Sums<ARITHMETIC, M_TILES, N_TILES>& sums, const int* pixels,
                                                  char* left, char* right, int row0, int tile0) {
    if constexpr (P::SPLIT) {
#if HAS_PLANES
      // Which row of a matrix each lane names: eight positions each of two groups of maps, or of two tiles of columns.
      const int lane = threadIdx.x % WARP;
      SharedAddress rows[M_TILES], starts[(N_TILES + 1) / 2];
      const SharedAddress at_left = address_of(left), at_right = address_of(right);
      UNROLL_FOR(int m = 0; m < M_TILES; m++)
        rows[m] = at_left + ((row0 + m * 16) / EIGHT + lane / EIGHT % 2) * LEFT_PITCH * 16;
      UNROLL_FOR(int n = 0; n < (N_TILES + 1) / 2; n++)
        starts[n] = at_right + start_of_tile(tile0 + n * 2 + (n * 2 + 1 < N_TILES ? lane / 16 : 0)) * 16;
      PAIRED_FOR(int k = 0; k < POSITIONS; k += K_STEP) {
        const int error = (k + lane % EIGHT + lane / 16 * EIGHT) * 16, pixel = pixels[k + lane % 16] * 16;
        SharedAddress own[M_TILES], columns[(N_TILES + 1) / 2];
        UNROLL_FOR(int m = 0; m < M_TILES; m++) own[m] = rows[m] + error;
        UNROLL_FOR(int n = 0; n < (N_TILES + 1) / 2; n++) columns[n] = starts[n] + pixel;
        multiply_planes<true>(sums, own, 0, LEFT_VECTORS * 16, columns, 0, RIGHT_VECTORS * 16);
      }
#endif
    } else {
      const float* at_left = reinterpret_cast<const float*>(left);
      const float* at_right = reinterpret_cast<const float*>(right);
      int starts[N_TILES];
      UNROLL_FOR(int n = 0; n < N_TILES; n++) starts[n] = start_of_tile(tile0 + n);
      for (int k0 = 0; k0 < POSITIONS; k0 += K_STEP)
        multiply_floats(
            sums,
            [&](int m, int row, int k) {
              const int map = row0 + m * 16 + row;
              return at_left[(map / EIGHT * LEFT_PITCH + k0 + k) * EIGHT + map % EIGHT];
            },
            [&](int n, int column, int k) { return at_right[(starts[n] + pixels[k0 + k]) * EIGHT + column]; });
    }
  }

  // Writes a tile's sums to a partial sum. results: SUM_BYTES of shared memory; a barrier comes before and after this.
  static __device__ __forceinline__ void leave(const Sums<ARITHMETIC, M_TILES, N_TILES>& sums, float* results,
                                               float* __restrict__ partial, int map0, int channel_group, int row0,
                                               int tile0, float back) {
    UNROLL_FOR(int n = 0; n < N_TILES; n++) {
      const int tile = tile0 + n;
      UNROLL_FOR(int m = 0; m < M_TILES; m++)
        UNROLL_FOR(int i = 0; i < 4; i++) {
          const int row = row0 + m * 16 + tile_row(i), column = tile_column(i);
          const float sum = sums.result(m, n, i, back);
          if (!REORDERS || tile >= COLUMN_TILES - 1)
            write(partial, map0 + row, tile, column, channel_group, sum);
          else
            results[row * SUM_PITCH + (tile % GROUPS * EIGHT + column) * Right::TAPS + tile / GROUPS] = sum;
        }
    }
    if constexpr (REORDERS) {
      __syncthreads();
      const int first = channel_group * EIGHT * Right::TAPS, maps = min(M, MAPS - map0);
      for (int i : block_range(maps * WEIGHTS)) {
        const int row = i / WEIGHTS, own = i % WEIGHTS;
        if (first + own < TERMS) partial[(map0 + row) * TERMS + first + own] = results[row * SUM_PITCH + own];
      }
    }
  }

  // The first of a group's chunks: groups differ by one at most.
  static __device__ __forceinline__ int start_of_group(int group, int groups, int chunks) {
    return group * (chunks / groups) + smaller_of(group, chunks % groups);
  }

  // The first vector of each pixel of the last group has a 1: the column of the biases.
  static __device__ __forceinline__ void stage_ones(char* right) {
    for (int pixel : block_range(Right::PIXELS)) {
      Eight eight = eight_zeros();
      eight.at[0] = 1.0f;
      P::store(right, RIGHT_VECTORS, GROUPS * Right::PITCH + pixel, eight, Range::MAPS);
    }
  }

  // Vectors (M / 8, LEFT_PITCH) of the errors of a chunk's positions. A thread has all positions of a window, so that what
  // belongs to it is loaded and split once.
  static __device__ __forceinline__ void stage_errors(char* left, const SumErrors<Layer>& errors, int first, int map0,
                                                      float factor) {
    constexpr int WINDOW = Right::WINDOW, CELLS = POSITIONS / WINDOW, SPARE = POSITIONS - CELLS * WINDOW;
    for (int i : block_range(M / EIGHT * CELLS)) {
      const int group = Right::CELLS == 1 ? i % (M / EIGHT) : i / CELLS;
      const int own = Right::CELLS == 1 ? i / (M / EIGHT) : i % CELLS;
      const int cell = first / WINDOW + own, image = cell / Right::CELLS, map = map0 + group * EIGHT;
      Eight eight = eight_zeros();
      int winner[EIGHT] = {};
      if (image < errors.count && map < MAPS) {
        const int at = (image * MAPS + map) * Right::CELLS + cell % Right::CELLS;
        eight = errors.load_cells(at, map);
        errors.load_winners(winner, at, map);
      }
      const auto words = P::words_of(eight, factor);
      UNROLL_FOR(int step = 0; step < WINDOW; step++) {
        const int element = first_of<WINDOW>(own, step);
        P::store(left, LEFT_VECTORS, group * LEFT_PITCH + own * WINDOW + element,
                 SumErrors<Layer>::share(words, winner, element));
      }
    }
    if constexpr (SPARE > 0)
      for (int i : block_range(M / EIGHT * SPARE))
        P::store(left, LEFT_VECTORS, i / SPARE * LEFT_PITCH + CELLS * WINDOW + i % SPARE, eight_zeros(), factor);
  }

  // Element (map, column of a tile) of a partial sum.
  static __device__ __forceinline__ void write(float* __restrict__ partial, int map, int tile, int column,
                                               int channel_group, float sum) {
    if (map >= MAPS || tile >= COLUMN_TILES) return;
    if (tile == COLUMN_TILES - 1) {
      if (column == 0 && channel_group == 0) partial[MAPS * TERMS + map] = sum;
      return;
    }
    const int channel = (channel_group + tile % GROUPS) * EIGHT + column;
    if (channel < Right::CHANNELS) partial[map * TERMS + channel * Right::TAPS + tile / GROUPS] = sum;
  }
};

}  // namespace graph
