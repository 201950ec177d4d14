// Plan `graph` of stage tuned, convolutions and fully connected layers: three products of matrices, each one kernel.
//
//   forward   target = source x weights, with bias, activation and subsampling at its end
//   errors    source errors = target errors x weights turned around: a convolution too
//   gradient  weight gradient = target errors x source, summed over positions in as many groups as there are partial sums
//
// A fully connected layer is a convolution of maps of one place. Nothing is unfolded in device memory (implicit GEMM: Chetlur
// et al., "cuDNN: Efficient primitives for deep learning", 2014); patch.cuh and planes.cuh explain what lies in shared memory.
// A block has one tile of a product at a time. It stages a chunk of channels and their weights, then multiplies; other
// blocks of the multiprocessor multiply while it waits for what it stages. Where there are too few tiles for a device,
// blocks share a tile's channels, and the last one to come adds their sums, always in the same order (split-K).
#pragma once
#include "../../conv.cuh"
#include "../../dropout.cuh"
#include "cells.cuh"

namespace graph {

// The product forward: a row is a position of the target's maps before subsampling, a column is a map.
template <class Layer>
struct ForwardSpec {
  using Map = PaddedSource<Layer>;
  static constexpr int M = Layer::FORWARD_M, N = Layer::FORWARD_N, WARPS_M = Layer::FORWARD_WARPS_M;
  static constexpr int CHUNK = Layer::FORWARD_CHUNK, TAP_ROWS = Layer::FORWARD_TAP_ROWS;
  static constexpr int PATCH_ROWS = Layer::FORWARD_PATCH_ROWS, PATCH_COLUMNS = Layer::FORWARD_PATCH_COLUMNS;
  static constexpr int SPLITS = Layer::FORWARD_SPLITS;
  static constexpr bool UNFOLD = Layer::FORWARD_UNFOLD, KEEPS_WEIGHTS = Layer::FORWARD_KEEPS_WEIGHTS;
  static constexpr int KERNEL_ROWS = Layer::KERNEL_ROWS, KERNEL_COLUMNS = Layer::KERNEL_COLUMNS;
  static constexpr int STEP_ROWS = Layer::STRIDE_ROWS, STEP_COLUMNS = Layer::STRIDE_COLUMNS;
  static constexpr int WINDOW_ROWS = Layer::WINDOW_ROWS, WINDOW_COLUMNS = Layer::WINDOW_COLUMNS;
  static constexpr int CELL_ROWS = Layer::OUT_ROWS, CELL_COLUMNS = Layer::OUT_COLUMNS;
  static constexpr int COLUMNS = Layer::MAPS;
  static constexpr bool COLUMNS_FIRST = false;  // in memory: weights of a map are neighbours

  // Weights of eight channels (or terms) for a map and a tap.
  static __device__ __forceinline__ Eight weights(const float* __restrict__ weight, int map, int channel, int tap) {
    constexpr int AREA = KERNEL_ROWS * KERNEL_COLUMNS, TERMS = Map::CHANNELS * AREA;
    if (map >= COLUMNS) return eight_zeros();
    constexpr bool NEIGHBOURS = UNFOLD || AREA == 1;
    return load_eight < NEIGHBOURS ? 1 : AREA,
           NEIGHBOURS && TERMS % 4 == 0 &&
               Layer::WEIGHT_OFFSET % 4 == 0 > (weight + map * TERMS + (NEIGHBOURS ? channel : channel * AREA + tap),
                                                (NEIGHBOURS ? TERMS : Map::CHANNELS) - channel);
  }
};

// The product backward: a row is a place of the source, a column one of its channels.
template <class Layer>
struct ErrorsSpec {
  using Map = SpreadErrors<Layer>;
  static constexpr int M = Layer::ERRORS_M, N = Layer::ERRORS_N, WARPS_M = Layer::ERRORS_WARPS_M;
  static constexpr int CHUNK = Layer::ERRORS_CHUNK, TAP_ROWS = Layer::ERRORS_TAP_ROWS;
  static constexpr int PATCH_ROWS = Layer::ERRORS_PATCH_ROWS, PATCH_COLUMNS = Layer::ERRORS_PATCH_COLUMNS;
  static constexpr int SPLITS = Layer::ERRORS_SPLITS;
  static constexpr bool UNFOLD = Layer::ERRORS_UNFOLD, KEEPS_WEIGHTS = Layer::ERRORS_KEEPS_WEIGHTS;
  static constexpr int KERNEL_ROWS = Layer::KERNEL_ROWS, KERNEL_COLUMNS = Layer::KERNEL_COLUMNS;
  static constexpr int STEP_ROWS = 1, STEP_COLUMNS = 1, WINDOW_ROWS = 1, WINDOW_COLUMNS = 1;
  static constexpr int CELL_ROWS = Layer::HEIGHT, CELL_COLUMNS = Layer::WIDTH;
  static constexpr int COLUMNS = Layer::CHANNELS;
  static constexpr bool COLUMNS_FIRST = true;  // in memory: weights of neighbouring channels are neighbours

  // Weights of eight maps (or terms) for a channel and a tap of the kernel turned around.
  static __device__ __forceinline__ Eight weights(const float* __restrict__ weight, int channel, int map, int tap) {
    constexpr int AREA = KERNEL_ROWS * KERNEL_COLUMNS, TERMS = COLUMNS * AREA;
    if (channel >= COLUMNS) return eight_zeros();
    if (!UNFOLD)
      return load_eight<TERMS, false>(weight + map * TERMS + channel * AREA + AREA - 1 - tap, Map::CHANNELS - map);
    Eight eight = eight_zeros();
    UNROLL_FOR(int e = 0; e < EIGHT; e++) {
      const int term = map + e;
      if (term < Map::CHANNELS * AREA)
        eight.at[e] = weight[term / AREA * TERMS + channel * AREA + AREA - 1 - term % AREA];
    }
    return eight;
  }
};

// One of these two products.
template <class Layer, class Spec>
struct Convolution {
  static constexpr int ARITHMETIC = made_of(Layer::ARITHMETIC), THREADS = Layer::THREADS;
  using P = Planes<ARITHMETIC>;
  using Left = Patch<Spec>;
  static constexpr int M = Spec::M, N = Spec::N, WARPS_M = Spec::WARPS_M;
  static constexpr int WARPS_N = smaller_of(THREADS / WARP / WARPS_M, N / EIGHT);
  static constexpr int M_TILES = M / 16 / WARPS_M, N_TILES = N / EIGHT / WARPS_N;
  static_assert(M_TILES * 16 * WARPS_M == M && N_TILES * EIGHT * WARPS_N == N, "warps share out a tile");
  static constexpr int CHUNK = Spec::CHUNK;  // groups of channels staged at a time
  static_assert(CHUNK % 2 == 0, "a step multiplies two groups");
  static constexpr int CHUNKS = ceil_div(Left::GROUPS, CHUNK), SPLITS = Spec::SPLITS;
  static constexpr int TAP_ROWS = Spec::TAP_ROWS;  // rows of the kernel whose weights are staged at a time
  static_assert(Left::TAP_ROWS % TAP_ROWS == 0, "rows of the kernel are staged in equal parts");
  static constexpr int TAPS = TAP_ROWS * Left::TAP_COLUMNS;
  static constexpr int LEFT_ITEMS = Left::template VECTORS<CHUNK>, RIGHT_ITEMS = TAPS * CHUNK * N;
  static constexpr bool FEW =
      LEFT_ITEMS + RIGHT_ITEMS <= 4 * THREADS && TAP_ROWS == Left::TAP_ROWS && M_TILES * N_TILES <= 2;
  static constexpr int LOADS = Spec::UNFOLD ? 2 : 4;  // of a thread, on their way before it stores the first
  static constexpr int IN_FLIGHT = ceil_div(LEFT_ITEMS + RIGHT_ITEMS, THREADS);
  static constexpr bool AHEAD = FEW && !Spec::KEEPS_WEIGHTS;
  static constexpr bool BY_CELLS = Spec::Map::WHOLE_WINDOWS && !Spec::UNFOLD && !AHEAD;

  // Shared memory: the pixel of each row, the patch, the weights. Sums take the place of the patch, and that of the weights
  // too where they are staged for each tile. KEEPS_WEIGHTS: a block stages all weights once, and has all of its tiles with
  // them.
  //
  // Vectors from a group of weights to the next, and from a tap to the next, such that eight neighbouring threads store in
  // eight different places of the banks: weight_pitches of cnnlib/stages/tuned/graph/tiles.py.
  static constexpr int N_PITCH = N + (TAPS > 1 ? 0 : CHUNK <= 4 ? EIGHT / CHUNK : 1);
  static constexpr int TAP_PITCH = CHUNK * N_PITCH + (TAPS == 1   ? 0
                                                      : TAPS % 2  ? TAPS % EIGHT
                                                      : TAPS <= 4 ? EIGHT / TAPS
                                                                  : 1);
  static constexpr int PARTS = Spec::KEEPS_WEIGHTS ? CHUNKS * (Left::TAP_ROWS / TAP_ROWS) : 1;
  static constexpr int PART_VECTORS = TAPS * TAP_PITCH;
  static constexpr int LEFT_VECTORS = CHUNK * Left::PITCH, RIGHT_VECTORS = PARTS * PART_VECTORS;
  static constexpr int LEFT_BYTES = LEFT_VECTORS * P::COUNT * P::VECTOR_BYTES;
  static constexpr int RIGHT_BYTES = RIGHT_VECTORS * P::COUNT * P::VECTOR_BYTES;
  static constexpr int SUM_PITCH = M + 4;  // floats from a column of sums to the next: fragments meet no bank twice
  static constexpr int SUM_BYTES = N * SUM_PITCH * 4;
  // Where the sum of a row lies in its column. Threads load four rows at once, neighbours often at a distance of sixteen:
  // those of eight threads meet no bank twice.
  static __device__ __forceinline__ int sum_at(int row) { return row ^ (row >> 5 & 3) << 2; }
  static constexpr int RIGHT_AT = M * 4 + (Spec::KEEPS_WEIGHTS ? larger_of(LEFT_BYTES, SUM_BYTES) : LEFT_BYTES);
  static constexpr int BYTES = larger_of(RIGHT_AT + RIGHT_BYTES, M * 4 + SUM_BYTES);
  static_assert(!Spec::KEEPS_WEIGHTS || (Spec::COLUMNS <= N && SPLITS == 1), "all tiles have the same weights");

  static constexpr int WIDE = ceil_div(Spec::COLUMNS, N);

  static __device__ __forceinline__ int tiles(int count) {
    return ceil_div(count * Left::CELLS * Left::WINDOW, Left::USED) * WIDE;
  }

  // Calls finish(first position, first column, sums) for every tile of this block, from job `first_job` on;
  // sums[column * SUM_PITCH + sum_at(row)] is already multiplied back by both factors. partials (tiles, SPLITS, M * N), tickets (tiles,) all 0: for sums of several blocks.
  template <class Finish>
  static __device__ __forceinline__ void multiply(char* memory, const typename Spec::Map& map,
                                                  const float* __restrict__ weight, float left_factor,
                                                  float right_factor, int first_job, int count,
                                                  float* __restrict__ partials, unsigned* __restrict__ tickets,
                                                  Finish finish) {
    int* pixels = reinterpret_cast<int*>(memory);
    char* left = memory + M * 4;
    char* right = memory + RIGHT_AT;
    float* results = reinterpret_cast<float*>(left);
    const float back = ARITHMETIC == F16X3 ? 1.0f / left_factor / right_factor : 1.0f;
    const int warp = threadIdx.x / WARP;
    const bool active = warp < WARPS_M * WARPS_N;
    const int row0 = warp % WARPS_M * M_TILES * 16, column0 = warp / WARPS_M * N_TILES * EIGHT;

    // A block without a tile stages nothing: no barrier would come before what it does next with this memory.
    if (Spec::KEEPS_WEIGHTS && first_job < tiles(count))
      for (int part = 0; part < PARTS; part++) stage_weights(right, weight, 0, part, right_factor);

    for (int job = first_job; job < tiles(count) * SPLITS; job += gridDim.x) {
      const int tile = job / SPLITS, split = job % SPLITS;
      const int first = tile / WIDE * Left::USED, first_column = tile % WIDE * N;
      for (int row : block_range(M)) pixels[row] = Left::pixel_of(first, row);
      if constexpr (BY_CELLS) ErrorCells<Left, CHUNK>::template clear<P>(left);
      Sums<ARITHMETIC, M_TILES, N_TILES> sums;
      sums.set_zero();
      const int last = min(CHUNKS, (split + 1) * ceil_div(CHUNKS, SPLITS));
      if constexpr (AHEAD) {
        Eight ahead[IN_FLIGHT];
        int chunk = split * ceil_div(CHUNKS, SPLITS);
        load_ahead(ahead, map, weight, first, first_column, chunk * CHUNK);
        for (; chunk < last; chunk++) {
          __syncthreads();
          store_ahead(ahead, left, right, left_factor, right_factor);
          __syncthreads();
          if (chunk + 1 < last) load_ahead(ahead, map, weight, first, first_column, (chunk + 1) * CHUNK);
          if (active) multiply_chunk(sums, pixels, left, right, 0, 0, row0, column0);
        }
      } else {
        for (int chunk = split * ceil_div(CHUNKS, SPLITS); chunk < last; chunk++)
          for (int tap_row = 0; tap_row < Left::TAP_ROWS; tap_row += TAP_ROWS) {
            __syncthreads();
            stage(left, right, map, weight, first, first_column, chunk * CHUNK, tap_row, left_factor, right_factor);
            __syncthreads();
            const int part = Spec::KEEPS_WEIGHTS ? part_of(chunk, tap_row) : 0;
            if (active) multiply_chunk(sums, pixels, left, right, tap_row, part * PART_VECTORS, row0, column0);
          }
      }
      __syncthreads();
      if (active)
        UNROLL_FOR(int m = 0; m < M_TILES; m++)
          UNROLL_FOR(int n = 0; n < N_TILES; n++)
            UNROLL_FOR(int i = 0; i < 4; i++)
              results[(column0 + n * EIGHT + tile_column(i)) * SUM_PITCH + sum_at(row0 + m * 16 + tile_row(i))] =
                  sums.result(m, n, i, back);
      __syncthreads();
      if (SPLITS == 1 || add_splits(results, partials, tickets, tile, split)) finish(first, first_column, results);
      __syncthreads();
    }
  }

  // What a thread stages of a chunk, in registers from when its loads begin until the one before has been multiplied.
  static __device__ __forceinline__ void load_ahead(Eight (&ahead)[IN_FLIGHT], const typename Spec::Map& map,
                                                    const float* __restrict__ weight, int first, int column,
                                                    int group) {
    UNROLL_FOR(int n = 0; n < IN_FLIGHT; n++) {
      const int i = n * THREADS + threadIdx.x;
      if (i < LEFT_ITEMS)
        ahead[n] = Left::template load<CHUNK>(map, first, group, i);
      else if (i < LEFT_ITEMS + RIGHT_ITEMS)
        ahead[n] = load_weights(weight, column, group, 0, i - LEFT_ITEMS);
    }
  }
  static __device__ __forceinline__ void store_ahead(const Eight (&ahead)[IN_FLIGHT], char* left, char* right,
                                                     float left_factor, float right_factor) {
    UNROLL_FOR(int n = 0; n < IN_FLIGHT; n++) {
      const int i = n * THREADS + threadIdx.x;
      if (i < LEFT_ITEMS)
        Left::template store<ARITHMETIC, CHUNK, CHUNK>(left, i, ahead[n], left_factor);
      else if (i < LEFT_ITEMS + RIGHT_ITEMS)
        store_weights(right, 0, i - LEFT_ITEMS, ahead[n], right_factor);
    }
  }

  // The number of the weights of a chunk and of some rows of the kernel, among all.
  static __device__ __forceinline__ int part_of(int chunk, int tap_row) {
    return chunk * (Left::TAP_ROWS / TAP_ROWS) + tap_row / TAP_ROWS;
  }

  // Stages one part of all weights that are kept.
  static __device__ __forceinline__ void stage_weights(char* right, const float* __restrict__ weight, int column,
                                                       int part, float factor) {
    constexpr int EACH = Left::TAP_ROWS / TAP_ROWS;
    for_eights<THREADS, RIGHT_ITEMS, LOADS>(
        [&](int i) { return load_weights(weight, column, part / EACH * CHUNK, part % EACH * TAP_ROWS, i); },
        [&](int i, const Eight& eight) { store_weights(right, part * PART_VECTORS, i, eight, factor); });
  }

  // Stages the patch of a chunk, with the first rows of the kernel, and the weights of some rows.
  static __device__ __forceinline__ void stage(char* left, char* right, const typename Spec::Map& map,
                                               const float* __restrict__ weight, int first, int column, int group,
                                               int tap_row, float left_factor, float right_factor) {
    const auto load_left = [&](int i) { return Left::template load<CHUNK>(map, first, group, i); };
    const auto store_left = [&](int i, const Eight& eight) {
      Left::template store<ARITHMETIC, CHUNK, CHUNK>(left, i, eight, left_factor);
    };
    const auto load_right = [&](int i) { return load_weights(weight, column, group, tap_row, i); };
    const auto store_right = [&](int i, const Eight& eight) { store_weights(right, 0, i, eight, right_factor); };
    if constexpr (BY_CELLS) {
      if (tap_row == 0) ErrorCells<Left, CHUNK>::template stage<P>(left, map, first, group, left_factor);
    } else {
      if (tap_row == 0) for_eights<THREADS, LEFT_ITEMS, LOADS>(load_left, store_left);
    }
    if constexpr (!Spec::KEEPS_WEIGHTS) for_eights<THREADS, RIGHT_ITEMS, LOADS>(load_right, store_right);
  }

  // Vector i of the weights (TAPS, CHUNK, N) of some rows of the kernel: taps are neighbours in memory.
  struct Item {
    int tap, n, staged;
  };
  static __device__ __forceinline__ Item item(int i) {
    constexpr bool COLUMNS_FIRST = Spec::COLUMNS_FIRST || TAPS > 1;
    const int rest = i / TAPS;
    return {i % TAPS, COLUMNS_FIRST ? rest % N : rest / CHUNK, COLUMNS_FIRST ? rest / N : rest % CHUNK};
  }

  static __device__ __forceinline__ Eight load_weights(const float* __restrict__ weight, int column, int group,
                                                       int tap_row, int i) {
    const Item own = item(i);
    return Spec::weights(weight, column + own.n, (group + own.staged) * EIGHT, tap_row * Left::TAP_COLUMNS + own.tap);
  }

  static __device__ __forceinline__ void store_weights(char* region, int first, int i, const Eight& eight,
                                                       float factor) {
    const Item own = item(i);
    P::store(region, RIGHT_VECTORS, first + own.tap * TAP_PITCH + own.staged * N_PITCH + own.n, eight, factor);
  }

  static __device__ __forceinline__ void multiply_chunk(Sums<ARITHMETIC, M_TILES, N_TILES>& sums, const int* pixels,
                                                        char* left, char* right, int tap_row, int part, int row0,
                                                        int column0) {
    if constexpr (P::SPLIT) {
#if HAS_PLANES
      // Which row of a matrix each lane names: rows of 16 positions and two groups; two tiles of columns and two groups.
      const int lane = threadIdx.x % WARP;
      SharedAddress rows[M_TILES], columns[(N_TILES + 1) / 2];
      const SharedAddress at_left = address_of(left), at_right = address_of(right);
      UNROLL_FOR(int m = 0; m < M_TILES; m++)
        rows[m] = at_left + (pixels[row0 + m * 16 + lane % 16] + lane / 16 * Left::PITCH + tap_row * Left::ROW) * 16;
      UNROLL_FOR(int n = 0; n < (N_TILES + 1) / 2; n++) {
        const int column = column0 + n * 16 + lane % EIGHT + (n * 2 + 1 < N_TILES ? lane / 16 * EIGHT : 0);
        columns[n] = at_right + (part + lane / EIGHT % 2 * N_PITCH + column) * 16;
      }
      ROLLED_FOR(int i = 0; i < TAP_ROWS; i++)
        UNROLL_FOR(int j = 0; j < Left::TAP_COLUMNS; j++)
          PAIRED_FOR(int pair = 0; pair < CHUNK; pair += 2)
            multiply_planes<false>(sums, rows, (i * Left::ROW + j + pair * Left::PITCH) * 16, LEFT_VECTORS * 16,
                                   columns, ((i * Left::TAP_COLUMNS + j) * TAP_PITCH + pair * N_PITCH) * 16,
                                   RIGHT_VECTORS * 16);
#endif
    } else {
      const float* at_left = reinterpret_cast<const float*>(left);
      const float* at_right = reinterpret_cast<const float*>(right);
      for (int i = 0; i < TAP_ROWS; i++)
        for (int j = 0; j < Left::TAP_COLUMNS; j++)
          for (int pair = 0; pair < CHUNK; pair += 2) {
            const int pixel = (tap_row + i) * Left::ROW + j + pair * Left::PITCH;
            const int vector = part + (i * Left::TAP_COLUMNS + j) * TAP_PITCH + pair * N_PITCH + column0;
            multiply_floats(
                sums,
                [&](int m, int row, int k) {
                  return at_left[(pixels[row0 + m * 16 + row] + pixel + k / EIGHT * Left::PITCH) * EIGHT + k % EIGHT];
                },
                [&](int n, int column, int k) {
                  return at_right[(vector + k / EIGHT * N_PITCH + n * EIGHT + column) * EIGHT + k % EIGHT];
                });
          }
    }
  }

  // By fours, of which a thread has up to eight on their way: several blocks' of one, or of several.
  static constexpr int FOURS = M * N / 4, ADDENDS = smaller_of(SPLITS, 8);
  static constexpr int SUMMED = smaller_of(ceil_div(FOURS, THREADS), 8 / ADDENDS);

  static __device__ __forceinline__ bool is_there(int i) { return FOURS % (SUMMED * THREADS) == 0 || i < FOURS; }

  // Leaves this block's sums of a tile with those of the others. The last block to come gets the sum of all, and true.
  static __device__ __forceinline__ bool add_splits(float* results, float* __restrict__ partials,
                                                    unsigned* __restrict__ tickets, int tile, int split) {
    Float4* all = reinterpret_cast<Float4*>(partials) + tile * SPLITS * FOURS;
    const auto at = [&](int i) {
      return reinterpret_cast<Float4*>(results + i / (M / 4) * SUM_PITCH + i % (M / 4) * 4);
    };
    for (int i : block_range(FOURS)) all[split * FOURS + i] = *at(i);
    __threadfence();
    __syncthreads();
    int is_last = 0;
    if (threadIdx.x == 0) is_last = atomicAdd(tickets + tile, 1u) == SPLITS - 1;
    if (!__syncthreads_or(is_last)) return false;
    if (threadIdx.x == 0) tickets[tile] = 0;  // for the next launch
    __threadfence();
    ROLLED_FOR(int begin = 0; begin < FOURS; begin += SUMMED * THREADS) {
      const int own = begin + threadIdx.x;
      Float4 sum[SUMMED] = {};
      UNROLL_FOR(int first = 0; first < SPLITS; first += ADDENDS) {
        Float4 four[ADDENDS][SUMMED];
        UNROLL_FOR(int n = 0; n < ADDENDS; n++)
          UNROLL_FOR(int s = 0; s < SUMMED; s++)
            if (first + n < SPLITS && is_there(own + s * THREADS))
              four[n][s] = load_l2(all + (first + n) * FOURS + own + s * THREADS);
        UNROLL_FOR(int n = 0; n < ADDENDS; n++)
          UNROLL_FOR(int s = 0; s < SUMMED; s++)
            if (first + n < SPLITS && is_there(own + s * THREADS))
              UNROLL_FOR(int e = 0; e < 4; e++) sum[s].at[e] += four[n][s].at[e];
      }
      UNROLL_FOR(int s = 0; s < SUMMED; s++)
        if (is_there(own + s * THREADS)) *at(own + s * THREADS) = sum[s];
    }
    __syncthreads();
    return true;
  }
};

// target (count, MAPS, OUT_ROWS, OUT_COLUMNS), winners likewise where a maximum is taken.
template <class Layer>
struct Forward {
  using Spec = ForwardSpec<Layer>;
  using Product = Convolution<Layer, Spec>;
  using Rows = Patch<Spec>;
  static constexpr int BYTES = Product::BYTES;
  static_assert(BYTES <= Layer::FORWARD_BYTES, "the launch asks for enough shared memory");

  static __device__ __forceinline__ void run(const float* __restrict__ source, const float* __restrict__ weight,
                                             const float* __restrict__ bias, float* __restrict__ target,
                                             unsigned char* __restrict__ winners, float* __restrict__ partials,
                                             unsigned* __restrict__ tickets, unsigned* __restrict__ peak, int seed_low,
                                             int seed_high, const int* __restrict__ now, int count) {
    SHARED_LARGE(char, memory, Layer::FORWARD_BYTES);
    wait_for_previous_kernel();
    let_next_kernel_start();
    if (blockIdx.x == 0 && threadIdx.x == 0) *peak = 0;  // of the errors that come back later
    Moment moment(seed_low, seed_high, 0, false);
    if constexpr (Layer::DROPS) moment = Moment(seed_low, seed_high, now);
    Product::multiply(memory, {source, count}, weight, Range::MAPS, Range::WEIGHTS, blockIdx.x, count, partials,
                      tickets, [&](int first, int first_map, const float* sums) {
                        finish(first, first_map, sums, bias, target, winners, moment, count);
                      });
  }

  static constexpr int TILE_CELLS = Rows::USED / Rows::WINDOW;
  // Four neighbouring windows of a map have one draw of dropout's mask, and are stored together.
  static constexpr bool FOURS =
      Rows::CELLS % 4 == 0 && TILE_CELLS % 4 == 0 && TILE_CELLS * Spec::N >= 4 * Layer::THREADS;

  // Writes a tile's windows.
  static __device__ __forceinline__ void finish(int first, int first_map, const float* sums,
                                                const float* __restrict__ bias, float* __restrict__ target,
                                                unsigned char* __restrict__ winners, const Moment& moment, int count) {
    if constexpr (FOURS) {
      finish_fours(first, first_map, sums, bias, target, winners, moment, count);
      return;
    }
    for (int i : block_range(TILE_CELLS * Spec::N)) {
      const int n = Rows::CELLS == 1 ? i % Spec::N : i / TILE_CELLS;
      const int own = Rows::CELLS == 1 ? i / Spec::N : i % TILE_CELLS;
      const int map = first_map + n, cell = first / Rows::WINDOW + own, image = cell / Rows::CELLS;
      if (map >= Layer::MAPS || image >= count) continue;
      const int element = map * Rows::CELLS + cell % Rows::CELLS, at = image * Layer::MAPS * Rows::CELLS + element;
      bool kept = true;
      if constexpr (Layer::DROPS) kept = !moment.training || Mask<Layer>::is_kept(moment, image, element);
      int winner;
      target[at] = value_of(sums + n * Product::SUM_PITCH, own * Rows::WINDOW, 0, bias[map], kept, moment, winner);
      if (SumErrors<Layer>::HAS_WINNERS) winners[at] = static_cast<unsigned char>(winner);
    }
  }

  static __device__ __forceinline__ void finish_fours(int first, int first_map, const float* sums,
                                                      const float* __restrict__ bias, float* __restrict__ target,
                                                      unsigned char* __restrict__ winners, const Moment& moment,
                                                      int count) {
    for (int i : block_range(TILE_CELLS / 4 * Spec::N)) {
      const int n = i / (TILE_CELLS / 4), own = i % (TILE_CELLS / 4) * 4;
      const int map = first_map + n, cell = first / Rows::WINDOW + own, image = cell / Rows::CELLS;
      if (map >= Layer::MAPS || image >= count) continue;
      const int element = map * Rows::CELLS + cell % Rows::CELLS, at = image * Layer::MAPS * Rows::CELLS + element;
      Words draws = {};
      if constexpr (Layer::DROPS)
        if (moment.training) draws = Mask<Layer>::words(moment, image, element / 4);
      Float4 results;
      unsigned four = 0;
      UNROLL_FOR(int e = 0; e < 4; e++) {
        bool kept = true;
        if constexpr (Layer::DROPS) kept = !moment.training || Mask<Layer>::keeps(draws.at[e]);
        int winner;
        results.at[e] = value_of(sums + n * Product::SUM_PITCH, own * Rows::WINDOW, e, bias[map], kept, moment, winner);
        four |= static_cast<unsigned>(winner) << e * 8;
      }
      *reinterpret_cast<Float4*>(target + at) = results;
      if (SumErrors<Layer>::HAS_WINNERS) *reinterpret_cast<unsigned*>(winners + at) = four;
    }
  }

  // The value of a column's window `window` behind row `first`, and its winner.
  static __device__ __forceinline__ float value_of(const float* column, int first, int window, float base, bool kept,
                                                   const Moment& moment, int& winner) {
    constexpr bool BEGINS_FOUR = FOURS || Rows::WINDOW % 4 == 0;  // `first` is a multiple of four
    float value[Spec::WINDOW_ROWS][Spec::WINDOW_COLUMNS];
    UNROLL_FOR(int y = 0; y < Spec::WINDOW_ROWS; y++)
      UNROLL_FOR(int x = 0; x < Spec::WINDOW_COLUMNS; x++) {
        const int row = window * Rows::WINDOW + y * Spec::WINDOW_COLUMNS + x;
        const int at = BEGINS_FOUR ? Product::sum_at(first + row / 4 * 4) + row % 4 : Product::sum_at(first + row);
        value[y][x] = activate<Layer::FUNCTION>(column[at] + base);
      }
    float result = subsample_window<Layer::METHOD>(value, &winner);
    if constexpr (Layer::DROPS)
      if (moment.training) {
        result = kept ? result * Layer::SCALE : 0.0f;
        if (!kept) winner = SumErrors<Layer>::DROPPED;
      }
    return result;
  }
};

// source_errors (count, CHANNELS, HEIGHT, WIDTH). The bits of their largest absolute value go to *source_peak, if that is
// larger than what it has.
template <class Layer>
struct Errors {
  using Spec = ErrorsSpec<Layer>;
  using Product = Convolution<Layer, Spec>;
  using Rows = Patch<Spec>;
  static constexpr int BYTES = Product::BYTES;

  static __device__ __forceinline__ void run(char* memory, const SumErrors<Layer>& errors,
                                             const float* __restrict__ weight, float* __restrict__ source_errors,
                                             unsigned* __restrict__ source_peak, float* __restrict__ partials,
                                             unsigned* __restrict__ tickets, float factor, int first_job, int count) {
    unsigned largest = 0;
    Product::multiply(memory, {errors}, weight, factor, Range::WEIGHTS, first_job, count, partials, tickets,
                      [&](int first, int first_channel, const float* sums) {
                        finish(first, first_channel, sums, source_errors, largest, count);
                      });
    // The order of atomics is not seen in a maximum.
    if (Layer::LEAVES_PEAK) {
      UNROLL_FOR(int lanes = WARP / 2; lanes > 0; lanes /= 2)
        largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
      if (threadIdx.x % WARP == 0 && largest > 0) atomicMax(source_peak, largest);
    }
  }

  static __device__ __forceinline__ void finish(int first, int first_channel, const float* sums,
                                                float* __restrict__ source_errors, unsigned& largest, int count) {
    if constexpr (Rows::CELLS % 4 == 0 && Spec::M * Spec::N >= 4 * Layer::THREADS) {
      for (int i : block_range(Spec::M / 4 * Spec::N)) {
        const int channel = first_channel + i / (Spec::M / 4), row = i % (Spec::M / 4) * 4;
        const int image = (first + row) / Rows::CELLS;
        if (channel >= Layer::CHANNELS || image >= count) continue;
        const Float4 four =
            *reinterpret_cast<const Float4*>(sums + i / (Spec::M / 4) * Product::SUM_PITCH + Product::sum_at(row));
        *reinterpret_cast<Float4*>(source_errors + (image * Layer::CHANNELS + channel) * Rows::CELLS +
                                   (first + row) % Rows::CELLS) = four;
        UNROLL_FOR(int e = 0; e < 4; e++)
          if (Layer::LEAVES_PEAK) largest = max(largest, bits_of_size(four.at[e]));
      }
      return;
    }
    for (int i : block_range(Spec::M * Spec::N)) {
      const int n = Rows::CELLS == 1 ? i % Spec::N : i / Spec::M;
      const int row = Rows::CELLS == 1 ? i / Spec::N : i % Spec::M;
      const int channel = first_channel + n, image = (first + row) / Rows::CELLS;
      if (channel >= Layer::CHANNELS || image >= count) continue;
      const float error = sums[n * Product::SUM_PITCH + Product::sum_at(row)];
      const int place = (first + row) % Rows::CELLS;
      source_errors[(image * Layer::CHANNELS + channel) * Rows::CELLS + place] = error;
      if (Layer::LEAVES_PEAK) largest = max(largest, bits_of_size(error));
    }
  }
};

}  // namespace graph
