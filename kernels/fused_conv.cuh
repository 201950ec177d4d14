// Stage fused: convolution + bias + activation + subsampling in one kernel; the full-size map stays on chip.
// Needs: CHANNELS, HEIGHT, WIDTH (source), MAPS, KERNEL, STRIDE, ROWS, COLUMNS (of the convolution),
// FUNCTION (IDENTITY without activation), WINDOW (1 without subsampling), METHOD, FIRST (no source errors),
// EACH (neighbouring maps a thread makes; divides MAPS), IMAGES (images a block takes at once, forward),
// RECOMPUTE (the backward pass needs the activated values again), PUSH (how errors reach the source),
// OWNED (rows of the weight gradient a thread owns), SPLITS (threads that share one such row).
#include "conv.cuh"

constexpr int THREADS = 256;
constexpr int AREA = ROWS * COLUMNS, TERMS = CHANNELS * KERNEL * KERNEL;
constexpr int SOURCE_SIZE = CHANNELS * HEIGHT * WIDTH;
constexpr int OUT_ROWS = ROWS / WINDOW, OUT_COLUMNS = COLUMNS / WINDOW;
constexpr int OUT_AREA = OUT_ROWS * OUT_COLUMNS, TARGET_SIZE = MAPS * OUT_AREA;
constexpr int ITEMS = MAPS / EACH * OUT_AREA;  // windows x groups of maps: what a thread makes at a time

// weights (TERMS, MAPS) in shared memory = transposed weight (MAPS, TERMS)
__device__ __forceinline__ void load_weights(const float* __restrict__ weight, float* weights) {
  for (int i = threadIdx.x; i < MAPS * TERMS; i += THREADS)
    weights[i % TERMS * MAPS + i / TERMS] = weight[i];
}

// Activated values of the windows of item (= group of maps, window), from a source image in shared memory.
__device__ __forceinline__ void activate_windows(const float* image, const float* weights,
                                                 const float* __restrict__ bias, int item,
                                                 float (&value)[EACH][WINDOW][WINDOW]) {
  const int map = item / OUT_AREA * EACH, y = item % OUT_AREA / OUT_COLUMNS;
  const int x = item % OUT_COLUMNS;
  const float* corner = image + y * WINDOW * STRIDE * WIDTH + x * WINDOW * STRIDE;
  float sum[WINDOW][WINDOW][EACH];
UNROLL
  for (int m = 0; m < EACH; m++)
UNROLL
    for (int a = 0; a < WINDOW; a++)
UNROLL
      for (int b = 0; b < WINDOW; b++) sum[a][b][m] = bias[map + m];
  convolve_window<CHANNELS, KERNEL, STRIDE, WINDOW, MAPS, EACH>(
      sum, [&](int c, int a) { return corner + (c * HEIGHT + a) * WIDTH; }, weights + map);
UNROLL
  for (int m = 0; m < EACH; m++)
UNROLL
    for (int a = 0; a < WINDOW; a++)
UNROLL
      for (int b = 0; b < WINDOW; b++) value[m][a][b] = activate<FUNCTION>(sum[a][b][m]);
}

// source (count, SOURCE_SIZE) -> target (count, TARGET_SIZE) and, for max, winners: each window's winning place
ENTRY(forward)
(const float* __restrict__ source, const float* __restrict__ weight, const float* __restrict__ bias,
 float* __restrict__ target, unsigned char* __restrict__ winners, int count) {
  SHARED_LARGE(float, weights, MAPS * TERMS + IMAGES * SOURCE_SIZE);
  float* images = weights + MAPS * TERMS;
  load_weights(weight, weights);
  for (int first = blockIdx.x * IMAGES; first < count; first += gridDim.x * IMAGES) {
    const int here = min(IMAGES, count - first);
    for (int i = threadIdx.x; i < here * SOURCE_SIZE; i += THREADS)
      images[i] = source[first * SOURCE_SIZE + i];
    __syncthreads();
    for (int job = threadIdx.x; job < here * ITEMS; job += THREADS) {
      const int image = job / ITEMS, item = job % ITEMS;
      float value[EACH][WINDOW][WINDOW];
      activate_windows(images + image * SOURCE_SIZE, weights, bias, item, value);
UNROLL
      for (int m = 0; m < EACH; m++) {
        int winner;
        const int at = (first + image) * TARGET_SIZE + (item / OUT_AREA * EACH + m) * OUT_AREA +
                       item % OUT_AREA;
        target[at] = subsample_window<WINDOW, METHOD>(value[m], &winner);
        if (WINDOW > 1 && METHOD == MAX) winners[at] = (unsigned char)winner;
      }
    }
    __syncthreads();
  }
}

// deltas (MAPS, AREA) in shared memory = derivative of the loss by the convolution's sums, for one image.
// The full-size error map exists only here. image and weights are read only where RECOMPUTE says so.
__device__ __forceinline__ void spread_errors(const float* image, const float* weights,
                                              const float* __restrict__ bias,
                                              const float* __restrict__ target,
                                              const unsigned char* __restrict__ winners,
                                              const float* __restrict__ target_errors,
                                              float* deltas) {
  for (int item = threadIdx.x; item < ITEMS; item += THREADS) {
    float value[EACH][WINDOW][WINDOW];
    if (RECOMPUTE) activate_windows(image, weights, bias, item, value);
    const int window = item % OUT_AREA;
    const int y = window / OUT_COLUMNS * WINDOW, x = window % OUT_COLUMNS * WINDOW;
UNROLL
    for (int m = 0; m < EACH; m++) {
      const int map = item / OUT_AREA * EACH + m, at = map * OUT_AREA + window;
      const float error = target_errors[at];
      // for max the target is the winner's own activated value; the losers' derivatives are not needed
      const float winning = RECOMPUTE ? 0.0f : error * slope<FUNCTION>(target[at]);
      const int winner = WINDOW > 1 && METHOD == MAX ? winners[at] : 0;
UNROLL
      for (int a = 0; a < WINDOW; a++)
UNROLL
        for (int b = 0; b < WINDOW; b++) {
          float delta;
          if (RECOMPUTE)
            delta = error / float(WINDOW * WINDOW) * slope<FUNCTION>(value[m][a][b]);
          else if (WINDOW > 1 && METHOD == MEAN)  // without activation the slope is 1 everywhere
            delta = error / float(WINDOW * WINDOW);
          else
            delta = a * WINDOW + b == winner ? winning : 0.0f;
          deltas[map * AREA + (y + a) * COLUMNS + x + b] = delta;
        }
    }
  }
}

// A row of the weight gradient is (map, channel, i): KERNEL neighbouring weights, which see the same errors and
// overlapping source values. SPLITS threads share one row, each taking every SPLITS-th row of positions.
constexpr int GRADIENT_ROWS = MAPS * CHANNELS * KERNEL;
constexpr int CHUNK = OWNED * THREADS / SPLITS;  // rows a block owns
constexpr int CHUNKS = (GRADIENT_ROWS + CHUNK - 1) / CHUNK;
constexpr int PARTIAL_SIZE = MAPS * TERMS + MAPS;  // weight gradient, then bias gradient
constexpr int WEIGHT_ARENA = SOURCE_SIZE + MAPS * AREA + (RECOMPUTE ? MAPS * TERMS : 0);
constexpr int MAP_QUADS = quads(MAPS);  // weights are held (channel, i, j, map), maps filled up to whole quads
constexpr int HELD_WEIGHTS = TERMS * MAP_QUADS * 4;
constexpr int ERROR_ARENA = FIRST ? 0
                                  : HELD_WEIGHTS + SOURCE_SIZE + MAPS * AREA +
                                        (RECOMPUTE ? SOURCE_SIZE + MAPS * TERMS : 0);
constexpr int SUM_ARENA = SPLITS > 1 ? THREADS * OWNED * (KERNEL + 1) : 0;
constexpr int ARENA = WEIGHT_ARENA > ERROR_ARENA
                          ? (WEIGHT_ARENA > SUM_ARENA ? WEIGHT_ARENA : SUM_ARENA)
                          : (ERROR_ARENA > SUM_ARENA ? ERROR_ARENA : SUM_ARENA);

// partials (groups, PARTIAL_SIZE): group g sums over images g, g + groups, ...; rows of chunk `chunk` only
__device__ __forceinline__ void sum_weight_gradient(
    float* arena, const float* __restrict__ source, const float* __restrict__ weight,
    const float* __restrict__ bias, const float* __restrict__ target,
    const unsigned char* __restrict__ winners, const float* __restrict__ target_errors,
    float* __restrict__ partials, int count, int groups, int group, int chunk) {
  float* image = arena;
  float* deltas = image + SOURCE_SIZE;
  float* weights = deltas + MAPS * AREA;
  const int split = threadIdx.x % SPLITS;
  const int row0 = chunk * CHUNK + threadIdx.x / SPLITS;
  float sum[OWNED][KERNEL + 1];  // the last one is the bias gradient's
UNROLL
  for (int owned = 0; owned < OWNED; owned++)
UNROLL
    for (int j = 0; j <= KERNEL; j++) sum[owned][j] = 0.0f;
  if (RECOMPUTE) load_weights(weight, weights);

  for (int n = group; n < count; n += groups) {
    __syncthreads();
    for (int i = threadIdx.x; i < SOURCE_SIZE; i += THREADS) image[i] = source[n * SOURCE_SIZE + i];
    if (RECOMPUTE) __syncthreads();
    spread_errors(image, weights, bias, target + n * TARGET_SIZE, winners + n * TARGET_SIZE,
                  target_errors + n * TARGET_SIZE, deltas);
    __syncthreads();
UNROLL
    for (int owned = 0; owned < OWNED; owned++) {
      const int row = row0 + owned * (THREADS / SPLITS);
      if (row >= GRADIENT_ROWS) break;
      const int map = row / (CHANNELS * KERNEL), channel = row / KERNEL % CHANNELS, i = row % KERNEL;
      for (int y = split; y < ROWS; y += SPLITS) {
        const float* delta = deltas + map * AREA + y * COLUMNS;
        const float* values = image + (channel * HEIGHT + y * STRIDE + i) * WIDTH;
        add_row_gradient<KERNEL, STRIDE>(sum[owned], delta, values, COLUMNS);
      }
    }
  }

  write_gradient_rows<THREADS, OWNED, SPLITS, KERNEL, CHANNELS, MAPS>(
      sum, row0, arena, partials + group * PARTIAL_SIZE);
}

constexpr int HELD = quads(MAPS) < 4 ? quads(MAPS) : 4;  // quads of errors a thread holds while it pushes them

// Push: each unit of the convolution adds its error, weighted, to the units it saw. For one (i, j) no two units of
// a channel reach the same source unit, so the sums need no atomics, and a barrier a (i, j) fixes their order.
__device__ __forceinline__ void push_errors(const float* deltas, const float* weights,
                                            float* errors) {
  for (int first = 0; first < CHANNELS * AREA; first += THREADS) {
    const int unit = first + threadIdx.x, channel = unit / AREA;
    const int y = unit % AREA / COLUMNS, x = unit % COLUMNS;
    const bool exists = unit < CHANNELS * AREA;
    for (int map0 = 0; map0 < MAPS; map0 += HELD * 4) {
      float delta[HELD * 4];
UNROLL
      for (int m = 0; m < HELD * 4; m++)
        delta[m] = exists && map0 + m < MAPS ? deltas[(map0 + m) * AREA + unit % AREA] : 0.0f;
      for (int i = 0; i < KERNEL; i++)
        for (int j = 0; j < KERNEL; j++) {
          if (exists) {
            const Float4* held = reinterpret_cast<const Float4*>(weights) +
                               ((channel * KERNEL + i) * KERNEL + j) * MAP_QUADS + map0 / 4;
            float sum = 0.0f;
UNROLL
            for (int quad = 0; quad < HELD; quad++) {
              if (map0 / 4 + quad >= MAP_QUADS) break;
              const Float4 four = held[quad];
UNROLL
              for (int m = 0; m < 4; m++) sum = fmaf(delta[quad * 4 + m], four.at[m], sum);
            }
            errors[(channel * HEIGHT + y * STRIDE + i) * WIDTH + x * STRIDE + j] += sum;
          }
          __syncthreads();
        }
    }
  }
}

// Pull: each source unit gathers from the units that saw it. No barriers, but every unit must find out which
// windows it was in, and the border asks in vain.
__device__ __forceinline__ void pull_errors(const float* deltas, const float* weights,
                                            float* errors) {
  for (int unit = threadIdx.x; unit < SOURCE_SIZE; unit += THREADS) {
    const int channel = unit / (HEIGHT * WIDTH), y = unit / WIDTH % HEIGHT, x = unit % WIDTH;
    float sum = 0.0f;
    for (int i = 0; i < KERNEL; i++) {
      const int row = y - i;  // first source row of the window, if there is one
      if (row < 0 || row % STRIDE || row / STRIDE >= ROWS) continue;
      for (int j = 0; j < KERNEL; j++) {
        const int column = x - j;
        if (column < 0 || column % STRIDE || column / STRIDE >= COLUMNS) continue;
        const float* weight = weights + ((channel * KERNEL + i) * KERNEL + j) * MAP_QUADS * 4;
        const float* delta = deltas + row / STRIDE * COLUMNS + column / STRIDE;
        for (int map = 0; map < MAPS; map++) sum = fmaf(delta[map * AREA], weight[map], sum);
      }
    }
    errors[unit] = sum;
  }
}

// One image's source errors, through shared memory; pushed or pulled.
template <bool PUSHED>
__device__ __forceinline__ void send_errors_back(
    float* arena, const float* __restrict__ source, const float* __restrict__ weight,
    const float* __restrict__ bias, const float* __restrict__ target,
    const unsigned char* __restrict__ winners, const float* __restrict__ target_errors,
    float* __restrict__ source_errors) {
  float* held = arena;
  float* errors = held + HELD_WEIGHTS;
  float* deltas = errors + SOURCE_SIZE;
  float* image = deltas + MAPS * AREA;
  float* weights = image + SOURCE_SIZE;
  for (int i = threadIdx.x; i < HELD_WEIGHTS; i += THREADS) {
    const int map = i % (MAP_QUADS * 4), term = i / (MAP_QUADS * 4);
    held[i] = map < MAPS ? weight[map * TERMS + term] : 0.0f;
  }
  if (RECOMPUTE) load_weights(weight, weights);
  for (int i = threadIdx.x; i < SOURCE_SIZE; i += THREADS) {
    if (PUSHED) errors[i] = 0.0f;
    if (RECOMPUTE) image[i] = source[i];
  }
  if (RECOMPUTE) __syncthreads();
  spread_errors(image, weights, bias, target, winners, target_errors, deltas);
  __syncthreads();
  if (PUSHED)
    push_errors(deltas, held, errors);
  else
    pull_errors(deltas, held, errors);
  __syncthreads();
  for (int i = threadIdx.x; i < SOURCE_SIZE; i += THREADS) source_errors[i] = errors[i];
  __syncthreads();
}

// The whole backward pass in one launch: blocks take jobs of two kinds, a group's share of the weight gradient or
// one image's source errors, so that small batches fill the GPU too.
ENTRY(backward)
(const float* __restrict__ source, const float* __restrict__ weight, const float* __restrict__ bias,
 const float* __restrict__ target, const unsigned char* __restrict__ winners,
 const float* __restrict__ target_errors, float* __restrict__ source_errors,
 float* __restrict__ partials, int count, int groups) {
  SHARED_LARGE(Float4, quad_arena, quads(ARENA));
  float* arena = reinterpret_cast<float*>(quad_arena);
  const int weight_jobs = groups * CHUNKS, jobs = weight_jobs + (FIRST ? 0 : count);
  for (int job = blockIdx.x; job < jobs; job += gridDim.x) {
    if (job < weight_jobs) {
      sum_weight_gradient(arena, source, weight, bias, target, winners, target_errors, partials,
                          count, groups, job / CHUNKS, job % CHUNKS);
    } else {
      const int n = job - weight_jobs;
      send_errors_back<PUSH>(arena, source + n * SOURCE_SIZE, weight, bias, target + n * TARGET_SIZE,
                             winners + n * TARGET_SIZE, target_errors + n * TARGET_SIZE,
                             source_errors + n * SOURCE_SIZE);
    }
    __syncthreads();
  }
}

// The two ways of the errors on their own, to be timed against each other.
template <bool PUSHED>
__device__ __forceinline__ void send_all_errors_back(
    float* arena, const float* __restrict__ source, const float* __restrict__ weight,
    const float* __restrict__ bias, const float* __restrict__ target,
    const unsigned char* __restrict__ winners, const float* __restrict__ target_errors,
    float* __restrict__ source_errors, int count) {
  for (int n = blockIdx.x; n < count; n += gridDim.x)
    send_errors_back<PUSHED>(arena, source + n * SOURCE_SIZE, weight, bias, target + n * TARGET_SIZE,
                             winners + n * TARGET_SIZE, target_errors + n * TARGET_SIZE,
                             source_errors + n * SOURCE_SIZE);
}

ENTRY(push_errors)
(const float* __restrict__ source, const float* __restrict__ weight, const float* __restrict__ bias,
 const float* __restrict__ target, const unsigned char* __restrict__ winners,
 const float* __restrict__ target_errors, float* __restrict__ source_errors, int count) {
  SHARED_LARGE(Float4, quad_arena, quads(ARENA));
  send_all_errors_back<true>(reinterpret_cast<float*>(quad_arena), source, weight, bias, target,
                             winners, target_errors, source_errors, count);
}

ENTRY(pull_errors)
(const float* __restrict__ source, const float* __restrict__ weight, const float* __restrict__ bias,
 const float* __restrict__ target, const unsigned char* __restrict__ winners,
 const float* __restrict__ target_errors, float* __restrict__ source_errors, int count) {
  SHARED_LARGE(Float4, quad_arena, quads(ARENA));
  send_all_errors_back<false>(reinterpret_cast<float*>(quad_arena), source, weight, bias, target,
                              winners, target_errors, source_errors, count);
}
