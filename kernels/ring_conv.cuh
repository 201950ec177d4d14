// Stage ring: as fused, but only a sliding window of rows is on chip, in a circular buffer in shared memory.
// Forward and weight gradient slide over the source maps, the source errors over the rows of the error maps;
// each row is fetched once, used by all KERNEL kernel rows, and its slot given to a row to come. So shared memory
// is bounded by the window, not by the map. Maps too wide for it are cut into tiles of columns.
//
// A unit of work is one image's tile of columns, all of its rows; a step of it makes a band of rows.
//
// Needs what fused_conv.cuh needs but IMAGES and PUSH; and: TILE (target columns of a unit), BAND (target rows of a
// step), UNITS (units a block takes in step), CHUNK_MAPS (maps whose weights a block holds; a multiple of EACH, or
// MAPS), ERROR_TILE (source columns of a unit of errors), ERROR_BAND (rows of the convolution's errors of a step),
// ERROR_UNITS, CHUNK_CHANNELS (channels whose weights a block holds there), ERROR_EACH (neighbouring channels a
// thread makes; divides CHANNELS and CHUNK_CHANNELS).
#include "async.cuh"
#include "conv.cuh"

constexpr int THREADS = 256;
constexpr int TERMS = CHANNELS * KERNEL * KERNEL;
constexpr int SOURCE_SIZE = CHANNELS * HEIGHT * WIDTH;
constexpr int OUT_ROWS = ROWS / WINDOW, OUT_COLUMNS = COLUMNS / WINDOW;
constexpr int OUT_AREA = OUT_ROWS * OUT_COLUMNS, TARGET_SIZE = MAPS * OUT_AREA;

// The sliding window over source rows: a step moves ADVANCE rows on.
constexpr int BAND_ROWS = BAND * WINDOW;  // of the convolution
constexpr int STEPS = (OUT_ROWS + BAND - 1) / BAND;
constexpr int ADVANCE = BAND_ROWS * STRIDE;
constexpr int SPAN = (BAND_ROWS - 1) * STRIDE + KERNEL;
constexpr int RING = STEPS > 1 ? SPAN + ADVANCE : SPAN;  // the rows in use and those on their way
constexpr int TILES = (OUT_COLUMNS + TILE - 1) / TILE;
constexpr int TILE_WIDTH = (TILE * WINDOW - 1) * STRIDE + KERNEL;
constexpr int RING_SIZE = CHANNELS * RING * TILE_WIDTH;  // floats of one unit

struct Unit {
  int image, column;  // column: first target column (source column, for errors) of the tile
};

template <int TILE_COUNT, int TILE_COLUMNS>
__device__ __forceinline__ Unit unit_of(int number) {
  return {number / TILE_COUNT, number % TILE_COUNT * TILE_COLUMNS};
}

// Start fetching source rows [row, row + rows) of `here` units from number `first` on into their rings.
// Columns beyond the map become zeros: their products with the zero errors there must not be NaN.
__device__ __forceinline__ void fetch_rows(float* rings, const float* __restrict__ source, int first,
                                           int here, int row, int rows) {
  const int each = CHANNELS * rows * TILE_WIDTH;
  for (int i = threadIdx.x; i < here * each; i += THREADS) {
    const int x = i % TILE_WIDTH, y = row + i / TILE_WIDTH % rows;
    const int channel = i / (TILE_WIDTH * rows) % CHANNELS, unit = i / each;
    const Unit u = unit_of<TILES, TILE>(first + unit);
    const int column = u.column * WINDOW * STRIDE + x;
    float* slot = rings + unit * RING_SIZE + (channel * RING + y % RING) * TILE_WIDTH + x;
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
  constexpr int CHUNKS = (MAPS + CHUNK_MAPS - 1) / CHUNK_MAPS;
  SHARED(float, weights, TERMS * CHUNK_MAPS);
  SHARED(float, rings, UNITS * RING_SIZE);
  const int units = count * TILES, sets = (units + together - 1) / together;
  for (int job = blockIdx.x; job < sets * CHUNKS; job += gridDim.x) {
    const int map0 = job / sets * CHUNK_MAPS, first = job % sets * together;
    const int maps = min(CHUNK_MAPS, MAPS - map0), here = min(together, units - first);
    const int items = maps / EACH * BAND * TILE;  // of one unit and step
    for (int i = threadIdx.x; i < maps * TERMS; i += THREADS)
      weights[i % TERMS * CHUNK_MAPS + i / TERMS] = weight[map0 * TERMS + i];
    fetch_rows(rings, source, first, here, 0, SPAN);
    wait_for_copies();
    __syncthreads();
    for (int step = 0; step < STEPS; step++) {
      if (step + 1 < STEPS) fetch_rows(rings, source, first, here, step * ADVANCE + SPAN, ADVANCE);
      for (int i = threadIdx.x; i < here * items; i += THREADS) {
        const int unit = i / items, x = i % TILE, y = step * BAND + i / TILE % BAND;
        const int map = i % items / (TILE * BAND) * EACH;
        const Unit u = unit_of<TILES, TILE>(first + unit);
        if (u.column + x >= OUT_COLUMNS || y >= OUT_ROWS) continue;
        const float* ring = rings + unit * RING_SIZE + x * WINDOW * STRIDE;
        float sum[WINDOW][WINDOW][EACH];
UNROLL
        for (int m = 0; m < EACH; m++)
UNROLL
          for (int a = 0; a < WINDOW; a++)
UNROLL
            for (int b = 0; b < WINDOW; b++) sum[a][b][m] = bias[map0 + map + m];
        convolve_window<CHANNELS, KERNEL, STRIDE, WINDOW, CHUNK_MAPS, EACH>(
            sum,
            [&](int c, int a) { return ring + (c * RING + (y * WINDOW * STRIDE + a) % RING) * TILE_WIDTH; },
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

// Derivative of the loss by one convolution sum, at map, row y, column x (of the convolution) of image n.
// activated() gives the activated value there; it is asked for only where RECOMPUTE says so.
template <class Activated>
__device__ __forceinline__ float delta_at(const float* __restrict__ target,
                                          const unsigned char* __restrict__ winners,
                                          const float* __restrict__ target_errors, int n, int map,
                                          int y, int x, Activated activated) {
  const int at = (n * MAPS + map) * OUT_AREA + y / WINDOW * OUT_COLUMNS + x / WINDOW;
  const float error = target_errors[at];
  if (RECOMPUTE) return error / float(WINDOW * WINDOW) * slope<FUNCTION>(activated());
  if (WINDOW > 1 && METHOD == MEAN) return error / float(WINDOW * WINDOW);
  if (WINDOW > 1 && winners[at] != y % WINDOW * WINDOW + x % WINDOW) return 0.0f;
  return error * slope<FUNCTION>(target[at]);
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

// Weight gradient: OWNED rows a thread, SPLITS threads a row, each taking every SPLITS-th row of positions.
constexpr int GRADIENT_ROWS = MAPS * CHANNELS * KERNEL;
constexpr int CHUNK = OWNED * THREADS / SPLITS;  // rows a block owns
constexpr int CHUNKS = (GRADIENT_ROWS + CHUNK - 1) / CHUNK;
constexpr int PARTIAL_SIZE = MAPS * TERMS + MAPS;
constexpr int DELTA_COLUMNS = TILE * WINDOW;
constexpr int DELTA_SIZE = MAPS * BAND_ROWS * DELTA_COLUMNS;  // the errors of one step of one unit
constexpr int WEIGHT_ARENA = RING_SIZE + (STEPS > 1 ? 2 : 1) * DELTA_SIZE;
constexpr int SUM_ARENA = SPLITS > 1 ? THREADS * OWNED * (KERNEL + 1) : 0;

// Source errors: the sliding window is over rows of the convolution's errors. A step brings ERROR_BAND of them and
// finishes the source rows that no later one reaches.
constexpr int ERROR_STEPS = (ROWS + ERROR_BAND - 1) / ERROR_BAND;
constexpr int BEFORE = (KERNEL - 1) / STRIDE;  // earlier rows that reach a step's source rows
// those, the step's own, and those being made; or all
constexpr int ERROR_RING = ERROR_STEPS > 1 ? BEFORE + 2 * ERROR_BAND : ROWS;
constexpr int ERROR_TILES = (WIDTH + ERROR_TILE - 1) / ERROR_TILE;
constexpr int ERROR_COLUMNS = (ERROR_TILE - 1) / STRIDE + 1 + BEFORE + 1;  // of the convolution
constexpr int ERROR_RING_SIZE = MAPS * ERROR_RING * ERROR_COLUMNS;
constexpr int MAP_QUADS = quads(MAPS);  // weights are held (channel, i, j, map), maps filled up to whole quads
constexpr int HELD_WEIGHTS = CHUNK_CHANNELS * KERNEL * KERNEL * MAP_QUADS * 4;
constexpr int ERROR_ARENA = FIRST ? 0 : HELD_WEIGHTS + ERROR_UNITS * ERROR_RING_SIZE;

constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int ARENA = larger(larger(WEIGHT_ARENA, SUM_ARENA), ERROR_ARENA);

// partials (groups, PARTIAL_SIZE): group g sums over units g, g + groups, ...; rows of chunk `chunk` only
__device__ __forceinline__ void sum_weight_gradient(
    float* arena, const float* __restrict__ source, const float* __restrict__ weight,
    const float* __restrict__ bias, const float* __restrict__ target,
    const unsigned char* __restrict__ winners, const float* __restrict__ target_errors,
    float* __restrict__ partials, int count, int groups, int group, int chunk) {
  float* ring = arena;
  float* deltas = arena + RING_SIZE;  // two sets: one in use, one being made
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
      for (int i = threadIdx.x; i < DELTA_SIZE; i += THREADS) {
        const int map = i / (DELTA_COLUMNS * BAND_ROWS);
        const int row = step * BAND_ROWS + i / DELTA_COLUMNS % BAND_ROWS;
        const int column = u.column * WINDOW + i % DELTA_COLUMNS;
        const bool exists = row < OUT_ROWS * WINDOW && column < OUT_COLUMNS * WINDOW;
        made[i] = !exists ? 0.0f
                          : delta_at(target, winners, target_errors, u.image, map, row, column, [&] {
                              return activated_at(source, weight, bias, u.image, map, row, column);
                            });
      }
    };
    __syncthreads();
    fetch_rows(ring, source, unit, 1, 0, SPAN);
    make_deltas(0);
    wait_for_copies();
    __syncthreads();
    for (int step = 0; step < STEPS; step++) {
      if (step + 1 < STEPS) fetch_rows(ring, source, unit, 1, step * ADVANCE + SPAN, ADVANCE);
UNROLL
      for (int owned = 0; owned < OWNED; owned++) {
        const int row = row0 + owned * (THREADS / SPLITS);
        if (row >= GRADIENT_ROWS) break;
        const int map = row / (CHANNELS * KERNEL), channel = row / KERNEL % CHANNELS;
        const float* delta = deltas + step % 2 * DELTA_SIZE + map * BAND_ROWS * DELTA_COLUMNS;
        for (int a = split; a < BAND_ROWS; a += SPLITS) {
          const int slot = (step * ADVANCE + a * STRIDE + row % KERNEL) % RING;
          add_row_gradient<KERNEL, STRIDE>(sum[owned], delta + a * DELTA_COLUMNS,
                                           ring + (channel * RING + slot) * TILE_WIDTH,
                                           DELTA_COLUMNS);
        }
      }
      if (step + 1 < STEPS) make_deltas(step + 1);
      wait_for_copies();
      __syncthreads();
    }
  }
  write_gradient_rows<THREADS, OWNED, SPLITS, KERNEL, CHANNELS, MAPS>(
      sum, row0, arena, partials + group * PARTIAL_SIZE);
}

// source_errors of units first ... first + here - 1, channels of chunk `chunk`
__device__ __forceinline__ void send_errors_back(
    float* arena, const float* __restrict__ source, const float* __restrict__ weight,
    const float* __restrict__ bias, const float* __restrict__ target,
    const unsigned char* __restrict__ winners, const float* __restrict__ target_errors,
    float* __restrict__ source_errors, int first, int here, int chunk) {
  constexpr int TAPS = KERNEL * KERNEL;
  float* weights = arena;
  float* rings = arena + HELD_WEIGHTS;
  const int channel0 = chunk * CHUNK_CHANNELS, channels = min(CHUNK_CHANNELS, CHANNELS - channel0);
  for (int i = threadIdx.x; i < channels * TAPS * MAP_QUADS * 4; i += THREADS) {
    const int map = i % (MAP_QUADS * 4), term = channel0 * TAPS + i / (MAP_QUADS * 4);
    weights[i] = map < MAPS ? weight[map * TERMS + term] : 0.0f;
  }
  // First column of the convolution that reaches source column `column`, and may lie left of the map.
  const auto first_column = [](int column) { return (column + STRIDE - 1) / STRIDE - BEFORE - 1; };
  const auto make_deltas = [&](int step) {  // a band of rows, zeros beside the map
    const int row0 = step * ERROR_BAND, rows = min(ERROR_BAND, ROWS - row0);
    const int each = MAPS * rows * ERROR_COLUMNS;
    for (int i = threadIdx.x; i < here * each; i += THREADS) {
      const int unit = i / each, x = i % ERROR_COLUMNS, row = row0 + i / ERROR_COLUMNS % rows;
      const int map = i % each / (ERROR_COLUMNS * rows);
      const Unit u = unit_of<ERROR_TILES, ERROR_TILE>(first + unit);
      const int column = first_column(u.column) + x;
      const bool exists = column >= 0 && column < COLUMNS;
      rings[unit * ERROR_RING_SIZE + (map * ERROR_RING + row % ERROR_RING) * ERROR_COLUMNS + x] =
          !exists ? 0.0f
                  : delta_at(target, winners, target_errors, u.image, map, row, column, [&] {
                      return activated_at(source, weight, bias, u.image, map, row, column);
                    });
    }
  };
  make_deltas(0);
  __syncthreads();
  for (int step = 0; step < ERROR_STEPS; step++) {
    if (step + 1 < ERROR_STEPS) make_deltas(step + 1);
    const int row0 = step * ERROR_BAND * STRIDE;
    const int rows = step + 1 < ERROR_STEPS ? ERROR_BAND * STRIDE : HEIGHT - row0;
    const int items = rows * (channels / ERROR_EACH) * ERROR_TILE;
    for (int i = threadIdx.x; i < here * items; i += THREADS) {
      const int unit = i / items, x = i % ERROR_TILE, row = row0 + i / ERROR_TILE % rows;
      const int channel = i % items / (ERROR_TILE * rows) * ERROR_EACH;
      const Unit u = unit_of<ERROR_TILES, ERROR_TILE>(first + unit);
      if (u.column + x >= WIDTH) continue;
      float sum[ERROR_EACH];
UNROLL
      for (int c = 0; c < ERROR_EACH; c++) sum[c] = 0.0f;
      for (int a = 0; a < KERNEL; a++) {
        const int upper = row - a;  // first source row of the window that sees this row as its a-th
        if (upper < 0 || upper % STRIDE || upper / STRIDE >= ROWS) continue;
        const float* line = rings + unit * ERROR_RING_SIZE + upper / STRIDE % ERROR_RING * ERROR_COLUMNS;
UNROLL
        for (int b = 0; b < KERNEL; b++) {
          const int left = u.column + x - b;
          if (STRIDE > 1 && (left < 0 || left % STRIDE)) continue;
          // for STRIDE 1 left may be negative, but then there is nothing to round
          const float* delta = line + left / STRIDE - first_column(u.column);
          const Quad* held = reinterpret_cast<const Quad*>(weights) +
                             (channel * TAPS + a * KERNEL + b) * MAP_QUADS;
          for (int quad = 0; quad < MAP_QUADS; quad++) {
            Quad four[ERROR_EACH];
UNROLL
            for (int c = 0; c < ERROR_EACH; c++) four[c] = held[c * TAPS * MAP_QUADS + quad];
UNROLL
            for (int m = 0; m < 4; m++) {
              if (MAPS % 4 && quad * 4 + m >= MAPS) break;
              const float value = delta[(quad * 4 + m) * ERROR_RING * ERROR_COLUMNS];
UNROLL
              for (int c = 0; c < ERROR_EACH; c++) sum[c] = fmaf(value, four[c].at[m], sum[c]);
            }
          }
        }
      }
UNROLL
      for (int c = 0; c < ERROR_EACH; c++)
        source_errors[u.image * SOURCE_SIZE + ((channel0 + channel + c) * HEIGHT + row) * WIDTH +
                      u.column + x] = sum[c];
    }
    __syncthreads();
  }
}

// The whole backward pass in one launch: jobs are a group's share of the weight gradient, or `together`
// <= ERROR_UNITS units' source errors.
ENTRY(backward)
(const float* __restrict__ source, const float* __restrict__ weight, const float* __restrict__ bias,
 const float* __restrict__ target, const unsigned char* __restrict__ winners,
 const float* __restrict__ target_errors, float* __restrict__ source_errors,
 float* __restrict__ partials, int count, int groups, int together) {
  constexpr int CHANNEL_CHUNKS = FIRST ? 0 : (CHANNELS + CHUNK_CHANNELS - 1) / CHUNK_CHANNELS;
  SHARED(Quad, quad_arena, quads(ARENA));
  float* arena = reinterpret_cast<float*>(quad_arena);
  const int units = count * ERROR_TILES, sets = (units + together - 1) / together;
  const int weight_jobs = groups * CHUNKS;
  for (int job = blockIdx.x; job < weight_jobs + sets * CHANNEL_CHUNKS; job += gridDim.x) {
    if (job < weight_jobs) {
      sum_weight_gradient(arena, source, weight, bias, target, winners, target_errors, partials,
                          count, groups, job / CHUNKS, job % CHUNKS);
    } else if (!FIRST) {
      const int number = job - weight_jobs, first = number % sets * together;
      send_errors_back(arena, source, weight, bias, target, winners, target_errors, source_errors,
                       first, min(together, units - first), number / sets);
    }
    __syncthreads();
  }
}
