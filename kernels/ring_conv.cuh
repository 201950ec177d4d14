// Stage ring: as fused, but only a sliding window of rows is on chip, in a circular buffer in shared memory.
// Forward and weight gradient slide over the source maps, the source errors over the rows of the error maps;
// each row is fetched once, used by all KERNEL kernel rows, and its slot given to a row to come. So shared memory
// is bounded by the window, not by the map. Maps too wide for it are cut into tiles of columns.
//
// A unit of work is one image's tile of columns, all of its rows; a step of it makes a band of rows.
//
// Needs what fused_conv.cuh needs but IMAGES and PUSH; and: TILE (target columns of a unit), FORWARD_BAND and BAND
// (target rows of a step, forward and for the weight gradient), UNITS (units a block takes in step), CHUNK_MAPS (maps
// whose weights a block holds; a multiple of EACH, or MAPS), ERROR_TILE (source columns of a unit of errors),
// ERROR_BAND (target rows of a step there), CHUNK_CHANNELS (channels whose weights a block holds there).
#include "async.cuh"
#include "conv.cuh"

constexpr int THREADS = 256;
constexpr int TERMS = CHANNELS * KERNEL * KERNEL;
constexpr int SOURCE_SIZE = CHANNELS * HEIGHT * WIDTH;
constexpr int OUT_ROWS = ROWS / WINDOW, OUT_COLUMNS = COLUMNS / WINDOW;
constexpr int OUT_AREA = OUT_ROWS * OUT_COLUMNS, TARGET_SIZE = MAPS * OUT_AREA;

constexpr int larger(int a, int b) { return a > b ? a : b; }

constexpr int TILES = (OUT_COLUMNS + TILE - 1) / TILE;
constexpr int TILE_WIDTH = (TILE * WINDOW - 1) * STRIDE + KERNEL;

// Floats from one row in shared memory to the next: an odd number of quads, so that the rows that the threads of
// a warp read at once lie in different banks. (Rows of 96 floats would all begin in the same one.)
__host__ __device__ constexpr int pitch(int width) { return (quads(width) | 1) * 4; }

// A sliding window over source rows that moves on by ROWS_A_STEP target rows.
template <int ROWS_A_STEP>
struct Window {
  static constexpr int STEPS = (OUT_ROWS + ROWS_A_STEP - 1) / ROWS_A_STEP;
  static constexpr int ADVANCE = ROWS_A_STEP * WINDOW * STRIDE;  // source rows that a step moves on
  static constexpr int SPAN = (ROWS_A_STEP * WINDOW - 1) * STRIDE + KERNEL;
  static constexpr int RING = STEPS > 1 ? SPAN + ADVANCE : SPAN;  // the rows in use and those on their way
  static constexpr int SIZE = CHANNELS * RING * pitch(TILE_WIDTH);  // floats of one unit

  // Where source row `row` of channel `channel` is, while it is in the window.
  __device__ __forceinline__ static int at(int channel, int row) {
    return (channel * RING + (STEPS > 1 ? row % RING : row)) * pitch(TILE_WIDTH);
  }
};

struct Unit {
  int image, column;  // column: first target column (source column, for errors) of the tile
};

template <int TILE_COUNT, int TILE_COLUMNS>
__device__ __forceinline__ Unit unit_of(int number) {
  return {number / TILE_COUNT, number % TILE_COUNT * TILE_COLUMNS};
}

// Start fetching source rows [row, row + ROWS_FETCHED) of `here` units from number `first` on into their rings.
// Columns and rows beyond the map become zeros: their products with the zero errors there must not be NaN.
template <class W, int ROWS_FETCHED>
__device__ __forceinline__ void fetch_rows(float* rings, const float* __restrict__ source, int first,
                                           int here, int row) {
  if (TILES == 1 && TILE_WIDTH == WIDTH && WIDTH % 4 == 0) {  // whole rows, four floats at a time
    constexpr int QUADS = WIDTH / 4, EACH_UNIT = CHANNELS * ROWS_FETCHED * QUADS;
    for (int i = threadIdx.x; i < here * EACH_UNIT; i += THREADS) {
      const int x = i % QUADS, y = row + i / QUADS % ROWS_FETCHED;
      const int channel = i / (QUADS * ROWS_FETCHED) % CHANNELS, unit = i / EACH_UNIT;
      Float4* slot = reinterpret_cast<Float4*>(rings + unit * W::SIZE + W::at(channel, y)) + x;
      if (y < HEIGHT)
        copy_async(slot, reinterpret_cast<const Float4*>(source) +
                             (((first + unit) * CHANNELS + channel) * HEIGHT + y) * QUADS + x);
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
    const int column = u.column * WINDOW * STRIDE + x;
    float* slot = rings + unit * W::SIZE + W::at(channel, y) + x;
    if (column < WIDTH && y < HEIGHT)
      copy_async(slot, source + ((u.image * CHANNELS + channel) * HEIGHT + y) * WIDTH + column);
    else
      *slot = 0.0f;
  }
}

// source (count, SOURCE_SIZE) -> target (count, TARGET_SIZE), winners; `together` <= UNITS units in step
ENTRY(forward)
(const float* __restrict__ source, const float* __restrict__ weight, const float* __restrict__ bias,
 float* __restrict__ target, unsigned char* __restrict__ winners, int count, int together) {
  using W = Window<FORWARD_BAND>;
  constexpr int CHUNKS = (MAPS + CHUNK_MAPS - 1) / CHUNK_MAPS;
  SHARED(Float4, quad_rings, UNITS * W::SIZE / 4);
  SHARED(float, weights, TERMS * CHUNK_MAPS);
  float* rings = reinterpret_cast<float*>(quad_rings);
  const int units = count * TILES, sets = (units + together - 1) / together;
  for (int job = blockIdx.x; job < sets * CHUNKS; job += gridDim.x) {
    const int map0 = job / sets * CHUNK_MAPS, first = job % sets * together;
    const int maps = min(CHUNK_MAPS, MAPS - map0), here = min(together, units - first);
    const int items = maps / EACH * FORWARD_BAND * TILE;  // of one unit and step
    fetch_rows<W, W::SPAN>(rings, source, first, here, 0);
    for (int i = threadIdx.x; i < maps * TERMS; i += THREADS)
      weights[i % TERMS * CHUNK_MAPS + i / TERMS] = weight[map0 * TERMS + i];
    wait_for_copies();
    __syncthreads();
    for (int step = 0; step < W::STEPS; step++) {
      if (step + 1 < W::STEPS)
        fetch_rows<W, W::ADVANCE>(rings, source, first, here, step * W::ADVANCE + W::SPAN);
      for (int i = threadIdx.x; i < here * items; i += THREADS) {
        const int unit = i / items, x = i % TILE, y = step * FORWARD_BAND + i / TILE % FORWARD_BAND;
        const int map = i % items / (TILE * FORWARD_BAND) * EACH;
        const Unit u = unit_of<TILES, TILE>(first + unit);
        if (u.column + x >= OUT_COLUMNS || y >= OUT_ROWS) continue;
        const float* ring = rings + unit * W::SIZE + x * WINDOW * STRIDE;
        float sum[WINDOW][WINDOW][EACH];
UNROLL
        for (int m = 0; m < EACH; m++)
UNROLL
          for (int a = 0; a < WINDOW; a++)
UNROLL
            for (int b = 0; b < WINDOW; b++) sum[a][b][m] = bias[map0 + map + m];
        convolve_window<CHANNELS, KERNEL, STRIDE, WINDOW, CHUNK_MAPS, EACH>(
            sum,
            [&](int c, int a) { return ring + W::at(c, y * WINDOW * STRIDE + a); },
            weights + map);
UNROLL
        for (int m = 0; m < EACH; m++) {
          float value[WINDOW][WINDOW];
UNROLL
          for (int a = 0; a < WINDOW; a++)
UNROLL
            for (int b = 0; b < WINDOW; b++) value[a][b] = activate<FUNCTION>(sum[a][b][m]);
          int winner;
          const int at = u.image * TARGET_SIZE + (map0 + map + m) * OUT_AREA + y * OUT_COLUMNS +
                         u.column + x;
          target[at] = subsample_window<WINDOW, METHOD>(value, &winner);
          if (WINDOW > 1 && METHOD == MAX) winners[at] = (unsigned char)winner;
        }
      }
      wait_for_copies();
      __syncthreads();
    }
  }
}

// Activated value of one position straight from device memory, for the rare network that needs it again:
// a mean over a curved activation. The L1 cache plays the ring's part.
__device__ __forceinline__ float activated_at(const float* __restrict__ source,
                                              const float* __restrict__ weight,
                                              const float* __restrict__ bias, int n, int map, int y,
                                              int x) {
  float sum = bias[map];
  for (int c = 0; c < CHANNELS; c++)
    for (int i = 0; i < KERNEL; i++)
      for (int j = 0; j < KERNEL; j++)
        sum = fmaf(source[((n * CHANNELS + c) * HEIGHT + y * STRIDE + i) * WIDTH + x * STRIDE + j],
                   weight[map * TERMS + (c * KERNEL + i) * KERNEL + j], sum);
  return activate<FUNCTION>(sum);
}

// Derivatives of the loss by the convolution's sums of one target window (map, y, x) of image n: spread[a][b].
__device__ __forceinline__ void spread_window(float (&spread)[WINDOW][WINDOW],
                                              const float* __restrict__ source,
                                              const float* __restrict__ weight,
                                              const float* __restrict__ bias,
                                              const float* __restrict__ target,
                                              const unsigned char* __restrict__ winners,
                                              const float* __restrict__ target_errors, int n,
                                              int map, int y, int x) {
  const int at = (n * MAPS + map) * OUT_AREA + y * OUT_COLUMNS + x;
  const float error = target_errors[at], share = error / float(WINDOW * WINDOW);
  const float winning = RECOMPUTE ? 0.0f : error * slope<FUNCTION>(target[at]);
  const int winner = WINDOW > 1 && METHOD == MAX ? winners[at] : 0;
UNROLL
  for (int a = 0; a < WINDOW; a++)
UNROLL
    for (int b = 0; b < WINDOW; b++) {
      if (RECOMPUTE)
        spread[a][b] = share * slope<FUNCTION>(activated_at(source, weight, bias, n, map,
                                                            y * WINDOW + a, x * WINDOW + b));
      else if (WINDOW > 1 && METHOD == MEAN)  // without activation the slope is 1 everywhere
        spread[a][b] = share;
      else
        spread[a][b] = a * WINDOW + b == winner ? winning : 0.0f;
    }
}

// Weight gradient: OWNED rows a thread, SPLITS threads a row, each taking every SPLITS-th row of positions.
constexpr int GRADIENT_ROWS = MAPS * CHANNELS * KERNEL;
constexpr int CHUNK = OWNED * THREADS / SPLITS;  // rows a block owns
constexpr int CHUNKS = (GRADIENT_ROWS + CHUNK - 1) / CHUNK;
constexpr int PARTIAL_SIZE = MAPS * TERMS + MAPS;
constexpr int BAND_ROWS = BAND * WINDOW;  // of the convolution
constexpr int DELTA_COLUMNS = TILE * WINDOW, DELTA_PITCH = pitch(DELTA_COLUMNS);
constexpr int DELTA_SIZE = MAPS * BAND_ROWS * DELTA_PITCH;  // the errors of one step of one unit
constexpr int WEIGHT_ARENA =
    Window<BAND>::SIZE + (Window<BAND>::STEPS > 1 ? 2 : 1) * DELTA_SIZE;
constexpr int SUM_ARENA = SPLITS > 1 ? THREADS * OWNED * (KERNEL + 1) : 0;

// Source errors: the circular buffer holds rows of them. A step brings ERROR_BAND target rows' worth of the
// convolution's errors, which push their share to the rows they saw; the rows that no later step reaches then go
// out, and their slots begin again at zero.
constexpr int ERROR_ROWS = ERROR_BAND * WINDOW;  // of the convolution, a step
constexpr int ERROR_STEPS = (OUT_ROWS + ERROR_BAND - 1) / ERROR_BAND;
constexpr int ERROR_ADVANCE = ERROR_ROWS * STRIDE;
constexpr int ERROR_RING = ERROR_STEPS > 1 ? (ERROR_ROWS - 1) * STRIDE + KERNEL : HEIGHT;
constexpr int ERROR_TILES = (WIDTH + ERROR_TILE - 1) / ERROR_TILE;
// Columns of the convolution that reach a tile; where there is one tile, all.
constexpr int ERROR_COLUMNS =
    ERROR_TILES > 1 ? (ERROR_TILE - 1) / STRIDE + 1 + (KERNEL - 1) / STRIDE + 1 : COLUMNS;
constexpr int MAP_QUADS = quads(MAPS);  // weights are held (channel, i, j, map), maps filled up to whole quads
constexpr int HELD_WEIGHTS = CHUNK_CHANNELS * KERNEL * KERNEL * MAP_QUADS * 4;
constexpr int ERROR_RING_SIZE = CHUNK_CHANNELS * ERROR_RING * ERROR_TILE;
constexpr int ERROR_ARENA =
    FIRST ? 0 : HELD_WEIGHTS + ERROR_RING_SIZE + MAPS * ERROR_ROWS * ERROR_COLUMNS;

constexpr int ARENA = larger(larger(WEIGHT_ARENA, SUM_ARENA), ERROR_ARENA);

// partials (groups, PARTIAL_SIZE): group g sums over units g, g + groups, ...; rows of chunk `chunk` only
__device__ __forceinline__ void sum_weight_gradient(
    float* arena, const float* __restrict__ source, const float* __restrict__ weight,
    const float* __restrict__ bias, const float* __restrict__ target,
    const unsigned char* __restrict__ winners, const float* __restrict__ target_errors,
    float* __restrict__ partials, int count, int groups, int group, int chunk) {
  using W = Window<BAND>;
  float* ring = arena;
  float* deltas = arena + W::SIZE;  // two sets: one in use, one being made
  const int split = threadIdx.x % SPLITS;
  const int row0 = chunk * CHUNK + threadIdx.x / SPLITS;
  float sum[OWNED][KERNEL + 1];
UNROLL
  for (int owned = 0; owned < OWNED; owned++)
UNROLL
    for (int j = 0; j <= KERNEL; j++) sum[owned][j] = 0.0f;

  for (int unit = group; unit < count * TILES; unit += groups) {
    const Unit u = unit_of<TILES, TILE>(unit);
    const auto make_deltas = [&](int step) {
      float* made = deltas + step % 2 * DELTA_SIZE;
      for (int i = threadIdx.x; i < MAPS * BAND * TILE; i += THREADS) {
        const int x = i % TILE, y = i / TILE % BAND, map = i / (TILE * BAND);
        float spread[WINDOW][WINDOW] = {};
        if (step * BAND + y < OUT_ROWS && u.column + x < OUT_COLUMNS)
          spread_window(spread, source, weight, bias, target, winners, target_errors, u.image, map,
                        step * BAND + y, u.column + x);
UNROLL
        for (int a = 0; a < WINDOW; a++)
UNROLL
          for (int b = 0; b < WINDOW; b++)
            made[(map * BAND_ROWS + y * WINDOW + a) * DELTA_PITCH + x * WINDOW + b] = spread[a][b];
      }
    };
    __syncthreads();
    fetch_rows<W, W::SPAN>(ring, source, unit, 1, 0);
    make_deltas(0);
    wait_for_copies();
    __syncthreads();
    for (int step = 0; step < W::STEPS; step++) {
      if (step + 1 < W::STEPS)
        fetch_rows<W, W::ADVANCE>(ring, source, unit, 1, step * W::ADVANCE + W::SPAN);
UNROLL
      for (int owned = 0; owned < OWNED; owned++) {
        const int row = row0 + owned * (THREADS / SPLITS);
        if (row >= GRADIENT_ROWS) break;
        const int map = row / (CHANNELS * KERNEL), channel = row / KERNEL % CHANNELS;
        const float* delta = deltas + step % 2 * DELTA_SIZE + map * BAND_ROWS * DELTA_PITCH;
        for (int a = split; a < BAND_ROWS; a += SPLITS) {
          const int source_row = step * W::ADVANCE + a * STRIDE + row % KERNEL;
          add_row_gradient<KERNEL, STRIDE>(sum[owned], delta + a * DELTA_PITCH,
                                           ring + W::at(channel, source_row), DELTA_COLUMNS);
        }
      }
      if (step + 1 < W::STEPS) make_deltas(step + 1);
      wait_for_copies();
      __syncthreads();
    }
  }
  write_gradient_rows<THREADS, OWNED, SPLITS, KERNEL, CHANNELS, MAPS>(
      sum, row0, arena, partials + group * PARTIAL_SIZE);
}

// source_errors of unit `unit`, channels of chunk `chunk`
__device__ __forceinline__ void send_errors_back(
    float* arena, const float* __restrict__ source, const float* __restrict__ weight,
    const float* __restrict__ bias, const float* __restrict__ target,
    const unsigned char* __restrict__ winners, const float* __restrict__ target_errors,
    float* __restrict__ source_errors, int unit, int chunk) {
  constexpr int TAPS = KERNEL * KERNEL;
  float* weights = arena;
  float* errors = arena + HELD_WEIGHTS;  // (CHUNK_CHANNELS, ERROR_RING, ERROR_TILE), the circular buffer
  float* deltas = errors + ERROR_RING_SIZE;
  const int channel0 = chunk * CHUNK_CHANNELS, channels = min(CHUNK_CHANNELS, CHANNELS - channel0);
  const Unit u = unit_of<ERROR_TILES, ERROR_TILE>(unit);
  // The first column of the convolution that reaches the tile; it may lie left of the map.
  const int column0 =
      ERROR_TILES > 1 ? (u.column + STRIDE - 1) / STRIDE - (KERNEL - 1) / STRIDE - 1 : 0;
  for (int i = threadIdx.x; i < channels * TAPS * MAP_QUADS * 4; i += THREADS) {
    const int map = i % (MAP_QUADS * 4), term = channel0 * TAPS + i / (MAP_QUADS * 4);
    weights[i] = map < MAPS ? weight[map * TERMS + term] : 0.0f;
  }
  for (int i = threadIdx.x; i < ERROR_RING_SIZE; i += THREADS) errors[i] = 0.0f;
  const auto slot = [](int row) { return ERROR_STEPS > 1 ? row % ERROR_RING : row; };
  for (int step = 0; step < ERROR_STEPS; step++) {
    // the windows that overlap the tile's columns, as far as there are any
    constexpr int ACROSS = ERROR_TILES > 1 ? (ERROR_COLUMNS + WINDOW - 1) / WINDOW + 1 : OUT_COLUMNS;
    const int across0 = ERROR_TILES > 1 ? (column0 + KERNEL * WINDOW) / WINDOW - KERNEL : 0;
    for (int i = threadIdx.x; i < MAPS * ERROR_BAND * ACROSS; i += THREADS) {
      const int x = across0 + i % ACROSS, map = i / (ACROSS * ERROR_BAND);
      const int band = i / ACROSS % ERROR_BAND, y = step * ERROR_BAND + band;
      float spread[WINDOW][WINDOW] = {};
      if (y < OUT_ROWS && x >= 0 && x < OUT_COLUMNS)
        spread_window(spread, source, weight, bias, target, winners, target_errors, u.image, map, y, x);
UNROLL
      for (int a = 0; a < WINDOW; a++)
UNROLL
        for (int b = 0; b < WINDOW; b++) {
          const int column = x * WINDOW + b - column0;
          if (ERROR_TILES > 1 && (column < 0 || column >= ERROR_COLUMNS)) continue;
          deltas[(map * ERROR_ROWS + band * WINDOW + a) * ERROR_COLUMNS + column] = spread[a][b];
        }
    }
    __syncthreads();
    constexpr int STEP_AREA = ERROR_ROWS * ERROR_COLUMNS;
    constexpr int HELD = MAP_QUADS < 4 ? MAP_QUADS : 4;  // quads of errors a thread holds while it pushes them
    for (int first = 0; first < channels * STEP_AREA; first += THREADS) {
      const int place = first + threadIdx.x, channel = place / STEP_AREA;
      const int y = place % STEP_AREA / ERROR_COLUMNS, x = place % ERROR_COLUMNS;
      const int row = step * ERROR_ADVANCE + y * STRIDE, left = (column0 + x) * STRIDE - u.column;
      const bool exists = channel < channels && row + KERNEL <= HEIGHT;
      for (int quad0 = 0; quad0 < MAP_QUADS; quad0 += HELD) {
        float delta[HELD * 4];
UNROLL
        for (int m = 0; m < HELD * 4; m++)
          delta[m] = exists && quad0 * 4 + m < MAPS
                         ? deltas[(quad0 * 4 + m) * STEP_AREA + place % STEP_AREA]
                         : 0.0f;
        for (int i = 0; i < KERNEL; i++)
          for (int j = 0; j < KERNEL; j++) {
            const bool inside = ERROR_TILES == 1 || (left + j >= 0 && left + j < ERROR_TILE);
            if (exists && inside) {
              const Float4* held = reinterpret_cast<const Float4*>(weights) +
                                 (channel * TAPS + i * KERNEL + j) * MAP_QUADS + quad0;
              float sum = 0.0f;
UNROLL
              for (int quad = 0; quad < HELD; quad++) {
                if (quad0 + quad >= MAP_QUADS) break;
                const Float4 four = held[quad];
UNROLL
                for (int m = 0; m < 4; m++) sum = fmaf(delta[quad * 4 + m], four.at[m], sum);
              }
              errors[(channel * ERROR_RING + slot(row + i)) * ERROR_TILE + left + j] += sum;
            }
            // for one (i, j) no two threads meet; the barrier fixes the order of the sums
            __syncthreads();
          }
      }
    }
    const int row0 = step * ERROR_ADVANCE;
    const int rows = step + 1 < ERROR_STEPS ? ERROR_ADVANCE : HEIGHT - row0;
    const bool last = step + 1 == ERROR_STEPS;
    for (int i = threadIdx.x; i < channels * rows * ERROR_TILE; i += THREADS) {
      const int x = i % ERROR_TILE, row = row0 + i / ERROR_TILE % rows, channel = i / (ERROR_TILE * rows);
      if (u.column + x >= WIDTH) continue;
      float* error = errors + (channel * ERROR_RING + slot(row)) * ERROR_TILE + x;
      // a row that no window saw (between two, or below the last) has no slot of its own
      const bool seen = last ? row < (ROWS - 1) * STRIDE + KERNEL : row - row0 < ERROR_RING;
      source_errors[u.image * SOURCE_SIZE + ((channel0 + channel) * HEIGHT + row) * WIDTH + u.column + x] =
          seen ? *error : 0.0f;
      if (seen && !last) *error = 0.0f;
    }
    __syncthreads();
  }
}

// The whole backward pass in one launch: jobs are a group's share of the weight gradient, or one unit's source errors.
ENTRY(backward)
(const float* __restrict__ source, const float* __restrict__ weight, const float* __restrict__ bias,
 const float* __restrict__ target, const unsigned char* __restrict__ winners,
 const float* __restrict__ target_errors, float* __restrict__ source_errors,
 float* __restrict__ partials, int count, int groups) {
  constexpr int CHANNEL_CHUNKS = FIRST ? 0 : (CHANNELS + CHUNK_CHANNELS - 1) / CHUNK_CHANNELS;
  SHARED(Float4, quad_arena, quads(ARENA));
  float* arena = reinterpret_cast<float*>(quad_arena);
  const int units = count * ERROR_TILES, weight_jobs = groups * CHUNKS;
  for (int job = blockIdx.x; job < weight_jobs + units * CHANNEL_CHUNKS; job += gridDim.x) {
    if (job < weight_jobs)
      sum_weight_gradient(arena, source, weight, bias, target, winners, target_errors, partials,
                          count, groups, job / CHUNKS, job % CHUNKS);
    else
      send_errors_back(arena, source, weight, bias, target, winners, target_errors, source_errors,
                       (job - weight_jobs) % units, (job - weight_jobs) / units);
    __syncthreads();
  }
}
