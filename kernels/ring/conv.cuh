// Stage ring: as fused, but only a sliding window of rows is on chip, in a circular buffer in shared memory.
//
// Forward and the weight gradient slide over the source maps, the source errors over the rows of the error maps; each
// row is fetched once, used by all rows of the kernel, and its slot given to a row to come. So shared memory is
// bounded by the window, not by the map. Maps too wide for it are cut into tiles of columns.
//
// A unit of work is one image's tile of columns, all of its rows; a step of it makes a band of rows. While a step is
// computed the rows of the next one are on their way (cp.async, see async.cuh).
#pragma once
#include "../async.cuh"
#include "../arithmetic.cuh"
#include "../conv.cuh"

namespace ring {

// Sizes are chosen by cnnlib/stages/ring.py, which knows how much shared memory there is; here is asserted what they
// must be.
template <class Layer>
struct Conv {
  static constexpr int THREADS = Layer::THREADS;                                                  // of every block
  static constexpr int CHANNELS = Layer::CHANNELS, HEIGHT = Layer::HEIGHT, WIDTH = Layer::WIDTH;  // of the source
  static constexpr int MAPS = Layer::MAPS, ROWS = Layer::ROWS, COLUMNS = Layer::COLUMNS;          // of the convolution
  static constexpr int KERNEL_ROWS = Layer::KERNEL_ROWS, KERNEL_COLUMNS = Layer::KERNEL_COLUMNS;
  static constexpr int STRIDE_ROWS = Layer::STRIDE_ROWS, STRIDE_COLUMNS = Layer::STRIDE_COLUMNS;
  static constexpr int PADDING_ROWS = Layer::PADDING_ROWS, PADDING_COLUMNS = Layer::PADDING_COLUMNS;
  static constexpr int FUNCTION = Layer::FUNCTION;  // IDENTITY without activation
  static constexpr int WINDOW_ROWS = Layer::WINDOW_ROWS, WINDOW_COLUMNS = Layer::WINDOW_COLUMNS;  // 1 if not subsampled
  static constexpr int METHOD = Layer::METHOD;
  static constexpr bool FIRST = Layer::FIRST;             // the network's first layer needs no source errors
  static constexpr bool RECOMPUTE = Layer::RECOMPUTE;     // backward needs the activated values again
  static constexpr int MAPS_EACH = Layer::MAPS_EACH;      // neighbouring maps that a thread makes
  static constexpr int ROWS_EACH = Layer::ROWS_EACH;      // rows of the weight gradient that a thread owns
  static constexpr int SPLIT_K = Layer::SPLIT_K;          // threads that share such a row, each with a part of the sum
  static constexpr int M_TILES = Layer::M_TILES;          // blocks that share out the rows of the weight gradient
  static constexpr int PARTIAL_SIZE = Layer::PARAMETERS;  // weight gradient, then bias gradient
  static constexpr int TILE = Layer::TILE, TILES = Layer::TILES;  // target columns of a unit; units an image
  static constexpr int PITCH = Layer::PITCH;                // floats from one source row in shared memory to the next
  static constexpr int FORWARD_BAND = Layer::FORWARD_BAND;  // target rows of a step
  static constexpr int FORWARD_RING = Layer::FORWARD_RING;  // source rows in shared memory
  static constexpr int UNITS = Layer::UNITS;                // units that a block takes in step
  static constexpr int CHUNK_MAPS = Layer::CHUNK_MAPS;      // maps whose weights a block holds
  static constexpr int MAP_CHUNKS = Layer::MAP_CHUNKS;
  static constexpr int BAND = Layer::BAND, RING = Layer::RING;  // of the weight gradient, likewise
  static constexpr int DELTA_PITCH = Layer::DELTA_PITCH;  // floats from one row of the convolution's errors to the next
  static constexpr int ERROR_TILE = Layer::ERROR_TILE,
                       ERROR_TILES = Layer::ERROR_TILES;        // of source errors: columns, units
  static constexpr int ERROR_BAND = Layer::ERROR_BAND;          // target rows of a step there
  static constexpr int ERROR_RING = Layer::ERROR_RING;          // rows of source errors in shared memory
  static constexpr int ERROR_COLUMNS = Layer::ERROR_COLUMNS;    // columns of the convolution that reach a tile
  static constexpr int CHUNK_CHANNELS = Layer::CHUNK_CHANNELS;  // channels whose weights a block holds there
  static constexpr int CHANNEL_CHUNKS = Layer::CHANNEL_CHUNKS;
  static constexpr int ARENA_FLOATS = Layer::ARENA_FLOATS;  // shared memory of the backward pass

  static constexpr int TAPS = KERNEL_ROWS * KERNEL_COLUMNS, TERMS = CHANNELS * TAPS;
  static constexpr int SOURCE_SIZE = CHANNELS * HEIGHT * WIDTH;
  // Rows and columns of a source map are counted from its padding on: the windows slide over zeros as over elements,
  // and errors of the padding are dropped when their row goes out.
  static constexpr int PADDED_HEIGHT = HEIGHT + 2 * PADDING_ROWS, PADDED_WIDTH = WIDTH + 2 * PADDING_COLUMNS;
  static constexpr int WINDOW_SIZE = WINDOW_ROWS * WINDOW_COLUMNS;
  static constexpr bool SUBSAMPLED = WINDOW_SIZE > 1;
  static constexpr int OUT_ROWS = ROWS / WINDOW_ROWS, OUT_COLUMNS = COLUMNS / WINDOW_COLUMNS;
  static_assert(OUT_ROWS * WINDOW_ROWS == ROWS && OUT_COLUMNS * WINDOW_COLUMNS == COLUMNS,
                "positions that no window covers are not computed: their errors are zero");
  static_assert((ROWS - 1) * STRIDE_ROWS + KERNEL_ROWS <= PADDED_HEIGHT &&
                    (COLUMNS - 1) * STRIDE_COLUMNS + KERNEL_COLUMNS <= PADDED_WIDTH,
                "every position sees elements of the padded source alone");
  static constexpr int OUT_AREA = OUT_ROWS * OUT_COLUMNS, TARGET_SIZE = MAPS * OUT_AREA;
  static constexpr int TILE_WIDTH = (TILE * WINDOW_COLUMNS - 1) * STRIDE_COLUMNS + KERNEL_COLUMNS;
  static_assert(TILES * TILE >= OUT_COLUMNS && MAP_CHUNKS * CHUNK_MAPS >= MAPS, "every column and map has a unit");
  static_assert(CHUNK_MAPS % MAPS_EACH == 0 && MAPS % MAPS_EACH == 0, "a thread's maps lie in one chunk");
  // An odd number of float4s: the rows that the threads of a warp read at once then lie in different banks. (Rows of 96
  // floats would all begin in the same one.)
  static_assert(PITCH >= TILE_WIDTH && PITCH % 8 == 4, "source rows without bank conflicts");
  static_assert(DELTA_PITCH >= TILE * WINDOW_COLUMNS && DELTA_PITCH % 8 == 4, "rows of errors without bank conflicts");

  // A sliding window over source rows that moves on by STEP_ROWS target rows a step.
  template <int STEP_ROWS, int RING_ROWS>
  struct Window {
    static constexpr int STEPS = ceil_div(OUT_ROWS, STEP_ROWS);
    static constexpr int ADVANCE = STEP_ROWS * WINDOW_ROWS * STRIDE_ROWS;  // source rows that a step moves on
    static constexpr int SPAN = (STEP_ROWS * WINDOW_ROWS - 1) * STRIDE_ROWS + KERNEL_ROWS;
    static constexpr int SIZE = CHANNELS * RING_ROWS * PITCH;  // floats of one unit
    static_assert(RING_ROWS >= (STEPS > 1 ? SPAN + ADVANCE : SPAN), "room for the rows in use and those on their way");

    // Where source row `row` of channel `channel` is, while it is in the window.
    __device__ __forceinline__ static int at(int channel, int row) {
      return (channel * RING_ROWS + (STEPS > 1 ? row % RING_ROWS : row)) * PITCH;
    }
  };

  struct Unit {
    int image, column;  // column: first target column (source column, for errors) of the tile
  };

  template <int TILE_COUNT, int TILE_COLUMNS>
  static __device__ __forceinline__ Unit unit_of(int number) {
    return {number / TILE_COUNT, number % TILE_COUNT * TILE_COLUMNS};
  }

  // Start fetching source rows [row, row + ROWS_FETCHED) of `here` units from number `first` on into their rings.
  // Columns and rows of the padding become zeros, and so do those beyond it, which some tiles and bands reach: their
  // products with the zero errors there must not be NaN.
  template <class W, int ROWS_FETCHED>
  static __device__ __forceinline__ void fetch_rows(float* rings, const float* __restrict__ source, int first, int here,
                                                    int row) {
    if constexpr (TILES == 1 && TILE_WIDTH == WIDTH && WIDTH % 4 == 0 && PADDING_ROWS == 0 &&
                  PADDING_COLUMNS == 0) {  // whole rows, four floats at a time
      constexpr int ROW_FLOAT4S = WIDTH / 4, EACH_UNIT = CHANNELS * ROWS_FETCHED * ROW_FLOAT4S;
      for (int i = threadIdx.x; i < here * EACH_UNIT; i += THREADS) {
        const int x = i % ROW_FLOAT4S, y = row + i / ROW_FLOAT4S % ROWS_FETCHED;
        const int channel = i / (ROW_FLOAT4S * ROWS_FETCHED) % CHANNELS, unit = i / EACH_UNIT;
        Float4* slot = reinterpret_cast<Float4*>(rings + unit * W::SIZE + W::at(channel, y)) + x;
        if (y < HEIGHT)
          copy_async(slot, reinterpret_cast<const Float4*>(source) +
                               (((first + unit) * CHANNELS + channel) * HEIGHT + y) * ROW_FLOAT4S + x);
        else
          *slot = Float4{};
      }
      return;
    }
    constexpr int EACH_UNIT = CHANNELS * ROWS_FETCHED * TILE_WIDTH;
    for (int i = threadIdx.x; i < here * EACH_UNIT; i += THREADS) {
      const int x = i % TILE_WIDTH, y = row + i / TILE_WIDTH % ROWS_FETCHED;
      const int channel = i / (TILE_WIDTH * ROWS_FETCHED) % CHANNELS, unit = i / EACH_UNIT;
      const Unit u = unit_of<TILES, TILE>(first + unit);
      const int column = u.column * WINDOW_COLUMNS * STRIDE_COLUMNS + x - PADDING_COLUMNS, map_row = y - PADDING_ROWS;
      float* slot = rings + unit * W::SIZE + W::at(channel, y) + x;
      if (column < WIDTH && map_row < HEIGHT && (PADDING_COLUMNS == 0 || column >= 0) &&
          (PADDING_ROWS == 0 || map_row >= 0))
        copy_async(slot, source + ((u.image * CHANNELS + channel) * HEIGHT + map_row) * WIDTH + column);
      else
        *slot = 0.0f;
    }
  }

  // source (count, SOURCE_SIZE) -> target (count, TARGET_SIZE), winners; `together` <= UNITS units in step
  static __device__ __forceinline__ void forward(const float* __restrict__ source, const float* __restrict__ weight,
                                                 const float* __restrict__ bias, float* __restrict__ target,
                                                 unsigned char* __restrict__ winners, int count, int together) {
    using W = Window<FORWARD_BAND, FORWARD_RING>;
    constexpr int CHUNK_WEIGHTS = TERMS * CHUNK_MAPS;
    SHARED(Float4, float4_rings, UNITS * W::SIZE / 4);
    SHARED(float, weights, CHUNK_WEIGHTS);
    float* rings = reinterpret_cast<float*>(float4_rings);
    const int units = count * TILES, sets = ceil_div(units, together);
    for (int job = blockIdx.x; job < sets * MAP_CHUNKS; job += gridDim.x) {
      const int map0 = job / sets * CHUNK_MAPS, first = job % sets * together;
      const int maps = min(CHUNK_MAPS, MAPS - map0), here = min(together, units - first);
      const int items = maps / MAPS_EACH * FORWARD_BAND * TILE;  // of one unit and step
      fetch_rows<W, W::SPAN>(rings, source, first, here, 0);
      for (int i = threadIdx.x; i < maps * TERMS; i += THREADS)
        weights[i % TERMS * CHUNK_MAPS + i / TERMS] = weight[map0 * TERMS + i];
      wait_for_copies();
      __syncthreads();
      for (int step = 0; step < W::STEPS; step++) {
        if (step + 1 < W::STEPS) fetch_rows<W, W::ADVANCE>(rings, source, first, here, step * W::ADVANCE + W::SPAN);
        for (int i = threadIdx.x; i < here * items; i += THREADS) {
          const int unit = i / items, x = i % TILE, y = step * FORWARD_BAND + i / TILE % FORWARD_BAND;
          const int map = i % items / (TILE * FORWARD_BAND) * MAPS_EACH;
          const Unit u = unit_of<TILES, TILE>(first + unit);
          if (u.column + x >= OUT_COLUMNS || y >= OUT_ROWS) continue;
          const float* ring = rings + unit * W::SIZE + x * WINDOW_COLUMNS * STRIDE_COLUMNS;
          float sum[WINDOW_ROWS][WINDOW_COLUMNS][MAPS_EACH];
          UNROLL_FOR(int m = 0; m < MAPS_EACH; m++)
            UNROLL_FOR(int a = 0; a < WINDOW_ROWS; a++)
              UNROLL_FOR(int b = 0; b < WINDOW_COLUMNS; b++) sum[a][b][m] = bias[map0 + map + m];
          convolve_window<Layer, CHUNK_MAPS>(
              sum, [&](int c, int a) { return ring + W::at(c, y * WINDOW_ROWS * STRIDE_ROWS + a); }, weights + map);
          UNROLL_FOR(int m = 0; m < MAPS_EACH; m++) {
            float value[WINDOW_ROWS][WINDOW_COLUMNS];
            UNROLL_FOR(int a = 0; a < WINDOW_ROWS; a++)
              UNROLL_FOR(int b = 0; b < WINDOW_COLUMNS; b++) value[a][b] = activate<FUNCTION>(sum[a][b][m]);
            int winner;
            const int at = u.image * TARGET_SIZE + (map0 + map + m) * OUT_AREA + y * OUT_COLUMNS + u.column + x;
            target[at] = subsample_window<METHOD>(value, &winner);
            if (SUBSAMPLED && METHOD == MAX) winners[at] = (unsigned char)winner;
          }
        }
        wait_for_copies();
        __syncthreads();
      }
    }
  }

  // Activated value of one position straight from device memory, for the rare network that needs it again:
  // a mean over a curved activation. The L1 cache plays the ring's part.
  static __device__ __forceinline__ float activated_at(const ConvArrays& arrays, int n, int map, int y, int x) {
    float sum = arrays.bias[map];
    for (int c = 0; c < CHANNELS; c++)
      for (int i = 0; i < KERNEL_ROWS; i++)
        for (int j = 0; j < KERNEL_COLUMNS; j++) {
          const int row = y * STRIDE_ROWS + i - PADDING_ROWS, column = x * STRIDE_COLUMNS + j - PADDING_COLUMNS;
          if (PADDING_ROWS > 0 && (row < 0 || row >= HEIGHT)) continue;
          if (PADDING_COLUMNS > 0 && (column < 0 || column >= WIDTH)) continue;
          sum = fmaf(arrays.source[((n * CHANNELS + c) * HEIGHT + row) * WIDTH + column],
                     arrays.weight[map * TERMS + (c * KERNEL_ROWS + i) * KERNEL_COLUMNS + j], sum);
        }
    return activate<FUNCTION>(sum);
  }

  // Derivatives of the loss by the convolution's sums of one target window (map, y, x) of image n: unpooled[a][b].
  static __device__ __forceinline__ void unpool(const ConvArrays& arrays, int n, int map, int y, int x,
                                                float (&unpooled)[WINDOW_ROWS][WINDOW_COLUMNS]) {
    const int at = (n * MAPS + map) * OUT_AREA + y * OUT_COLUMNS + x;
    const float error = arrays.target_errors[at], share = error / float(WINDOW_SIZE);
    const float winning = RECOMPUTE ? 0.0f : error * slope<FUNCTION>(arrays.target[at]);
    const int winner = SUBSAMPLED && METHOD == MAX ? arrays.winners[at] : 0;
    UNROLL_FOR(int a = 0; a < WINDOW_ROWS; a++)
      UNROLL_FOR(int b = 0; b < WINDOW_COLUMNS; b++) {
        if (RECOMPUTE)
          unpooled[a][b] =
              share * slope<FUNCTION>(activated_at(arrays, n, map, y * WINDOW_ROWS + a, x * WINDOW_COLUMNS + b));
        else if (SUBSAMPLED && METHOD == MEAN)  // without activation the slope is 1 everywhere
          unpooled[a][b] = share;
        else
          unpooled[a][b] = a * WINDOW_COLUMNS + b == winner ? winning : 0.0f;
      }
  }

  // Weight gradient: ROWS_EACH rows a thread, SPLIT_K threads a row, each taking every SPLIT_K-th row of positions.
  static constexpr int GRADIENT_ROWS = MAPS * CHANNELS * KERNEL_ROWS;
  static constexpr int M_TILE = ROWS_EACH * THREADS / SPLIT_K;  // rows a block owns
  static_assert(M_TILES * M_TILE >= GRADIENT_ROWS, "every row has a block");
  static_assert(PARTIAL_SIZE == MAPS * TERMS + MAPS, "a partial sum has a gradient of each weight and each bias");
  static constexpr int SPLIT_FLOATS = SPLIT_K > 1 ? THREADS * ROWS_EACH * (KERNEL_COLUMNS + 1) : 0;
  static_assert(ARENA_FLOATS >= SPLIT_FLOATS, "room to add up the split sums");
  static constexpr int BAND_ROWS = BAND * WINDOW_ROWS;  // of the convolution
  static constexpr int DELTA_COLUMNS = TILE * WINDOW_COLUMNS;
  static constexpr int DELTA_SIZE = MAPS * BAND_ROWS * DELTA_PITCH;  // the errors of one step of one unit

  // Source errors: the circular buffer holds rows of them. A step brings ERROR_BAND target rows' worth of the
  // convolution's errors, which push their share to the rows they saw; the rows that no later step reaches then go
  // out, and their slots begin again at zero.
  static constexpr int ERROR_ROWS = ERROR_BAND * WINDOW_ROWS;  // of the convolution, a step
  static constexpr int ERROR_STEPS = ceil_div(OUT_ROWS, ERROR_BAND);
  static constexpr int ERROR_ADVANCE = ERROR_ROWS * STRIDE_ROWS;
  // Weights are held as (channel, i, j, map), maps filled up to whole float4s.
  static constexpr int MAP_FLOAT4S = ceil_div(MAPS, 4);
  static constexpr int HELD_WEIGHTS = CHUNK_CHANNELS * TAPS * MAP_FLOAT4S * 4;
  static constexpr int ERROR_RING_SIZE = CHUNK_CHANNELS * ERROR_RING * ERROR_TILE;
  static_assert(ERROR_TILES * ERROR_TILE >= PADDED_WIDTH && CHANNEL_CHUNKS * CHUNK_CHANNELS >= CHANNELS,
                "every source column and channel has a unit");
  static_assert(ERROR_RING >= (ERROR_STEPS > 1 ? (ERROR_ROWS - 1) * STRIDE_ROWS + KERNEL_ROWS : PADDED_HEIGHT),
                "room for the rows of a step");
  static constexpr int COLUMNS_LEFT = (KERNEL_COLUMNS - 1) / STRIDE_COLUMNS + 1;  // of a tile, that may reach it
  static_assert(ERROR_COLUMNS == (ERROR_TILES > 1 ? (ERROR_TILE - 1) / STRIDE_COLUMNS + 1 + COLUMNS_LEFT : COLUMNS),
                "the columns that reach a tile; where there is one tile, all");
  static_assert(FIRST || ARENA_FLOATS >= HELD_WEIGHTS + ERROR_RING_SIZE + MAPS * ERROR_ROWS * ERROR_COLUMNS,
                "room for weights, the ring of source errors and a step of the convolution's");

  // Group `group` of the partial sums, of units group, group + groups, ...; block `tile`'s rows of the gradient only.
  static __device__ __forceinline__ void backward_weights(const ConvArrays& arrays, float* arena, int count, int groups,
                                                          int group, int tile) {
    using W = Window<BAND, RING>;
    static_assert(ARENA_FLOATS >= W::SIZE + (W::STEPS > 1 ? 2 : 1) * DELTA_SIZE, "room for the window and the errors");
    float* ring = arena;
    float* deltas = arena + W::SIZE;  // two sets: one in use, one being made
    const int split = threadIdx.x % SPLIT_K;
    const int row0 = tile * M_TILE + threadIdx.x / SPLIT_K;
    float sum[ROWS_EACH][KERNEL_COLUMNS + 1];
    UNROLL_FOR(int owned = 0; owned < ROWS_EACH; owned++)
      UNROLL_FOR(int j = 0; j <= KERNEL_COLUMNS; j++) sum[owned][j] = 0.0f;

    for (int unit = group; unit < count * TILES; unit += groups) {
      const Unit u = unit_of<TILES, TILE>(unit);
      const auto make_deltas = [&](int step) {
        float* made = deltas + step % 2 * DELTA_SIZE;
        for (int i = threadIdx.x; i < MAPS * BAND * TILE; i += THREADS) {
          const int x = i % TILE, y = i / TILE % BAND, map = i / (TILE * BAND);
          float unpooled[WINDOW_ROWS][WINDOW_COLUMNS] = {};
          if (step * BAND + y < OUT_ROWS && u.column + x < OUT_COLUMNS)
            unpool(arrays, u.image, map, step * BAND + y, u.column + x, unpooled);
          UNROLL_FOR(int a = 0; a < WINDOW_ROWS; a++)
            UNROLL_FOR(int b = 0; b < WINDOW_COLUMNS; b++)
              made[(map * BAND_ROWS + y * WINDOW_ROWS + a) * DELTA_PITCH + x * WINDOW_COLUMNS + b] = unpooled[a][b];
        }
      };
      __syncthreads();
      fetch_rows<W, W::SPAN>(ring, arrays.source, unit, 1, 0);
      make_deltas(0);
      wait_for_copies();
      __syncthreads();
      for (int step = 0; step < W::STEPS; step++) {
        if (step + 1 < W::STEPS) fetch_rows<W, W::ADVANCE>(ring, arrays.source, unit, 1, step * W::ADVANCE + W::SPAN);
        UNROLL_FOR(int owned = 0; owned < ROWS_EACH; owned++) {
          const int row = row0 + owned * (THREADS / SPLIT_K);
          if (row >= GRADIENT_ROWS) break;
          const int map = row / (CHANNELS * KERNEL_ROWS), channel = row / KERNEL_ROWS % CHANNELS;
          const float* delta = deltas + step % 2 * DELTA_SIZE + map * BAND_ROWS * DELTA_PITCH;
          for (int a = split; a < BAND_ROWS; a += SPLIT_K) {
            const int source_row = step * W::ADVANCE + a * STRIDE_ROWS + row % KERNEL_ROWS;
            add_row_gradient<KERNEL_COLUMNS, STRIDE_COLUMNS>(sum[owned], delta + a * DELTA_PITCH,
                                                             ring + W::at(channel, source_row), DELTA_COLUMNS);
          }
        }
        if (step + 1 < W::STEPS) make_deltas(step + 1);
        wait_for_copies();
        __syncthreads();
      }
    }
    write_gradient_rows<THREADS, SPLIT_K, CHANNELS * KERNEL_ROWS, MAPS>(sum, row0, arena,
                                                                        arrays.partials + group * PARTIAL_SIZE);
  }

  // The source errors of one unit, for the channels of one chunk.
  static __device__ __forceinline__ void backward_data(const ConvArrays& arrays, float* arena, int unit, int chunk) {
    float* weights = arena;
    float* errors = arena + HELD_WEIGHTS;  // (CHUNK_CHANNELS, ERROR_RING, ERROR_TILE), the circular buffer
    float* deltas = errors + ERROR_RING_SIZE;
    const int channel0 = chunk * CHUNK_CHANNELS, channels = min(CHUNK_CHANNELS, CHANNELS - channel0);
    const Unit u = unit_of<ERROR_TILES, ERROR_TILE>(unit);
    // The first column of the convolution that reaches the tile; it may lie left of the map.
    const int column0 = ERROR_TILES > 1 ? (u.column + STRIDE_COLUMNS - 1) / STRIDE_COLUMNS - COLUMNS_LEFT : 0;
    for (int i = threadIdx.x; i < channels * TAPS * MAP_FLOAT4S * 4; i += THREADS) {
      const int map = i % (MAP_FLOAT4S * 4), term = channel0 * TAPS + i / (MAP_FLOAT4S * 4);
      weights[i] = map < MAPS ? arrays.weight[map * TERMS + term] : 0.0f;
    }
    for (int i = threadIdx.x; i < ERROR_RING_SIZE; i += THREADS) errors[i] = 0.0f;
    const auto slot = [](int row) { return ERROR_STEPS > 1 ? row % ERROR_RING : row; };
    for (int step = 0; step < ERROR_STEPS; step++) {
      // the windows that overlap the tile's columns, as far as there are any
      constexpr int ACROSS = ERROR_TILES > 1 ? ceil_div(ERROR_COLUMNS, WINDOW_COLUMNS) + 1 : OUT_COLUMNS;
      const int across0 =
          ERROR_TILES > 1 ? (column0 + KERNEL_COLUMNS * WINDOW_COLUMNS) / WINDOW_COLUMNS - KERNEL_COLUMNS : 0;
      for (int i = threadIdx.x; i < MAPS * ERROR_BAND * ACROSS; i += THREADS) {
        const int x = across0 + i % ACROSS, map = i / (ACROSS * ERROR_BAND);
        const int band = i / ACROSS % ERROR_BAND, y = step * ERROR_BAND + band;
        float unpooled[WINDOW_ROWS][WINDOW_COLUMNS] = {};
        if (y < OUT_ROWS && x >= 0 && x < OUT_COLUMNS) unpool(arrays, u.image, map, y, x, unpooled);
        UNROLL_FOR(int a = 0; a < WINDOW_ROWS; a++)
          UNROLL_FOR(int b = 0; b < WINDOW_COLUMNS; b++) {
            const int column = x * WINDOW_COLUMNS + b - column0;
            if (ERROR_TILES > 1 && (column < 0 || column >= ERROR_COLUMNS)) continue;
            deltas[(map * ERROR_ROWS + band * WINDOW_ROWS + a) * ERROR_COLUMNS + column] = unpooled[a][b];
          }
      }
      __syncthreads();
      constexpr int STEP_AREA = ERROR_ROWS * ERROR_COLUMNS;
      constexpr int HELD = MAP_FLOAT4S < 4 ? MAP_FLOAT4S : 4;  // float4s of errors that a thread holds
      for (int first = 0; first < channels * STEP_AREA; first += THREADS) {
        const int position = first + threadIdx.x, channel = position / STEP_AREA;
        const int y = position % STEP_AREA / ERROR_COLUMNS, x = position % ERROR_COLUMNS;
        const int row = step * ERROR_ADVANCE + y * STRIDE_ROWS, left = (column0 + x) * STRIDE_COLUMNS - u.column;
        const bool exists = channel < channels && row + KERNEL_ROWS <= PADDED_HEIGHT;
        for (int first4 = 0; first4 < MAP_FLOAT4S; first4 += HELD) {
          float delta[HELD * 4];
          UNROLL_FOR(int m = 0; m < HELD * 4; m++)
            delta[m] =
                exists && first4 * 4 + m < MAPS ? deltas[(first4 * 4 + m) * STEP_AREA + position % STEP_AREA] : 0.0f;
          for (int i = 0; i < KERNEL_ROWS; i++)
            for (int j = 0; j < KERNEL_COLUMNS; j++) {
              const bool inside = ERROR_TILES == 1 || (left + j >= 0 && left + j < ERROR_TILE);
              if (exists && inside) {
                const Float4* held = reinterpret_cast<const Float4*>(weights) +
                                     (channel * TAPS + i * KERNEL_COLUMNS + j) * MAP_FLOAT4S + first4;
                float sum = 0.0f;
                UNROLL_FOR(int m4 = 0; m4 < HELD; m4++) {
                  if (first4 + m4 >= MAP_FLOAT4S) break;
                  const Float4 four = held[m4];
                  UNROLL_FOR(int m = 0; m < 4; m++) sum = fmaf(delta[m4 * 4 + m], four.at[m], sum);
                }
                errors[(channel * ERROR_RING + slot(row + i)) * ERROR_TILE + left + j] += sum;
              }
              // for one (i, j) no two threads meet; the barrier fixes the order of the sums
              __syncthreads();
            }
        }
      }
      const int row0 = step * ERROR_ADVANCE;
      const int rows = step + 1 < ERROR_STEPS ? ERROR_ADVANCE : PADDED_HEIGHT - row0;
      const bool last = step + 1 == ERROR_STEPS;
      for (int i = threadIdx.x; i < channels * rows * ERROR_TILE; i += THREADS) {
        const int x = i % ERROR_TILE, row = row0 + i / ERROR_TILE % rows, channel = i / (ERROR_TILE * rows);
        const int map_row = row - PADDING_ROWS, column = u.column + x - PADDING_COLUMNS;
        if (column >= WIDTH || (PADDING_COLUMNS > 0 && column < 0)) continue;
        float* error = errors + (channel * ERROR_RING + slot(row)) * ERROR_TILE + x;
        // a row that no window saw (between two, or below the last) has no slot of its own
        const bool seen = last ? row < (ROWS - 1) * STRIDE_ROWS + KERNEL_ROWS : row - row0 < ERROR_RING;
        if (PADDING_ROWS == 0 || (map_row >= 0 && map_row < HEIGHT))  // the padding's errors are dropped
          arrays.source_errors[u.image * SOURCE_SIZE + ((channel0 + channel) * HEIGHT + map_row) * WIDTH + column] =
              seen ? *error : 0.0f;
        if (seen && !last) *error = 0.0f;
      }
      __syncthreads();
    }
  }

  // The whole backward pass in one launch: jobs are a group's share of the weight gradient, or one unit's source
  // errors.
  static __device__ __forceinline__ void backward(const ConvArrays& arrays, int count, int groups) {
    SHARED(Float4, float4_arena, ceil_div(ARENA_FLOATS, 4));
    float* arena = reinterpret_cast<float*>(float4_arena);
    const int units = count * ERROR_TILES, weight_jobs = groups * M_TILES;
    for (int job = blockIdx.x; job < weight_jobs + units * (FIRST ? 0 : CHANNEL_CHUNKS); job += gridDim.x) {
      if (job < weight_jobs)
        backward_weights(arrays, arena, count, groups, job / M_TILES, job % M_TILES);
      else
        backward_data(arrays, arena, (job - weight_jobs) % units, (job - weight_jobs) / units);
      __syncthreads();
    }
  }
};

}  // namespace ring

#define RING_CONV_KERNELS(layer)                                                                                 \
  ENTRY_POINT(layer, forward)                                                                                    \
  (const float* __restrict__ source, const float* __restrict__ weight, const float* __restrict__ bias,           \
   float* __restrict__ target, unsigned char* __restrict__ winners, int count, int together) {                   \
    ring::Conv<layer>::forward(source, weight, bias, target, winners, count, together);                          \
  }                                                                                                              \
  ENTRY_POINT(layer, backward)                                                                                   \
  (const float* __restrict__ source, const float* __restrict__ weight, const float* __restrict__ bias,           \
   const float* __restrict__ target, const unsigned char* __restrict__ winners,                                  \
   const float* __restrict__ target_errors, float* __restrict__ source_errors, float* __restrict__ partials,     \
   int count, int groups) {                                                                                      \
    ring::Conv<layer>::backward({source, weight, bias, target, winners, target_errors, source_errors, partials}, \
                                count, groups);                                                                  \
  }
