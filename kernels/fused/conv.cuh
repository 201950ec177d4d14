// Stage fused: convolution, bias, activation and subsampling in one kernel; the full-size map stays on chip.
//
// Forward keeps each window's value and, for max, which of its elements won. Backward rebuilds one image's full-size
// error map from these in shared memory (unpool), sums the weight gradient over images in groups (split-K over
// blocks) and sends errors back to the source: pushed by the units of the convolution, or pulled by those of the
// source.
#pragma once
#include "../arithmetic.cuh"
#include "../conv.cuh"

namespace fused {

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
  static constexpr bool PUSH = Layer::PUSH;               // how errors reach the source
  static constexpr bool RECOMPUTE = Layer::RECOMPUTE;     // backward needs the activated values again
  static constexpr int IMAGES = Layer::IMAGES;            // images that a block takes at once, forward
  static constexpr int MAPS_EACH = Layer::MAPS_EACH;      // neighbouring maps that a thread makes
  static constexpr int ROWS_EACH = Layer::ROWS_EACH;      // rows of the weight gradient that a thread owns
  static constexpr int SPLIT_K = Layer::SPLIT_K;          // threads that share such a row, each with a part of the sum
  static constexpr int M_TILES = Layer::M_TILES;          // blocks that share out the rows of the weight gradient
  static constexpr int PARTIAL_SIZE = Layer::PARAMETERS;  // weight gradient, then bias gradient
  static constexpr int FORWARD_BYTES = Layer::FORWARD_BYTES, BACKWARD_BYTES = Layer::BACKWARD_BYTES;  // shared memory

  static constexpr int AREA = ROWS * COLUMNS, TERMS = CHANNELS * KERNEL_ROWS * KERNEL_COLUMNS;
  static constexpr int SOURCE_SIZE = CHANNELS * HEIGHT * WIDTH;
  // In shared memory a source map and its errors have their padding around them: zeros, and errors that are dropped.
  static constexpr bool PADDED = PADDING_ROWS > 0 || PADDING_COLUMNS > 0;
  static constexpr int PADDED_HEIGHT = HEIGHT + 2 * PADDING_ROWS, PADDED_WIDTH = WIDTH + 2 * PADDING_COLUMNS;
  static constexpr int PADDED_SIZE = CHANNELS * PADDED_HEIGHT * PADDED_WIDTH;
  static constexpr int WINDOW_SIZE = WINDOW_ROWS * WINDOW_COLUMNS;
  static constexpr bool SUBSAMPLED = WINDOW_SIZE > 1;
  static constexpr int OUT_ROWS = ROWS / WINDOW_ROWS, OUT_COLUMNS = COLUMNS / WINDOW_COLUMNS;
  static_assert(OUT_ROWS * WINDOW_ROWS == ROWS && OUT_COLUMNS * WINDOW_COLUMNS == COLUMNS,
                "positions that no window covers are not computed: their errors are zero");
  static_assert((ROWS - 1) * STRIDE_ROWS + KERNEL_ROWS <= PADDED_HEIGHT &&
                    (COLUMNS - 1) * STRIDE_COLUMNS + KERNEL_COLUMNS <= PADDED_WIDTH,
                "every position sees elements of the padded source alone");
  static constexpr int OUT_AREA = OUT_ROWS * OUT_COLUMNS, TARGET_SIZE = MAPS * OUT_AREA;
  static constexpr int ITEMS = MAPS / MAPS_EACH * OUT_AREA;  // windows x groups of maps: what a thread makes at a time

  // Where element i of a source map (CHANNELS, HEIGHT, WIDTH) is among those of the padded map.
  static __device__ __forceinline__ int in_padded(int i) {
    if (!PADDED) return i;
    const int channel = i / (HEIGHT * WIDTH), y = i / WIDTH % HEIGHT, x = i % WIDTH;
    return (channel * PADDED_HEIGHT + y + PADDING_ROWS) * PADDED_WIDTH + x + PADDING_COLUMNS;
  }

  // The padding of `count` images becomes zero, and stays so: only their elements within it are written later.
  static __device__ __forceinline__ void clear_padding(float* images, int count) {
    if (!PADDED) return;
    for (int i = threadIdx.x; i < count * PADDED_SIZE; i += THREADS) images[i] = 0.0f;
    __syncthreads();
  }

  // weights (TERMS, MAPS) in shared memory = transposed weight (MAPS, TERMS)
  static __device__ __forceinline__ void load_weights(const float* __restrict__ weight, float* weights) {
    for (int i = threadIdx.x; i < MAPS * TERMS; i += THREADS) weights[i % TERMS * MAPS + i / TERMS] = weight[i];
  }

  // Activated values of the windows of item (= group of maps, window), from a padded source image in shared memory.
  static __device__ __forceinline__ void activate_windows(const float* image, const float* weights,
                                                          const float* __restrict__ bias, int item,
                                                          float (&value)[MAPS_EACH][WINDOW_ROWS][WINDOW_COLUMNS]) {
    const int map = item / OUT_AREA * MAPS_EACH, y = item % OUT_AREA / OUT_COLUMNS;
    const int x = item % OUT_COLUMNS;
    const float* corner = image + y * WINDOW_ROWS * STRIDE_ROWS * PADDED_WIDTH + x * WINDOW_COLUMNS * STRIDE_COLUMNS;
    float sum[WINDOW_ROWS][WINDOW_COLUMNS][MAPS_EACH];
    UNROLL_FOR(int m = 0; m < MAPS_EACH; m++)
      UNROLL_FOR(int a = 0; a < WINDOW_ROWS; a++)
        UNROLL_FOR(int b = 0; b < WINDOW_COLUMNS; b++) sum[a][b][m] = bias[map + m];
    convolve_window<Layer, MAPS>(
        sum, [&](int c, int a) { return corner + (c * PADDED_HEIGHT + a) * PADDED_WIDTH; }, weights + map);
    UNROLL_FOR(int m = 0; m < MAPS_EACH; m++)
      UNROLL_FOR(int a = 0; a < WINDOW_ROWS; a++)
        UNROLL_FOR(int b = 0; b < WINDOW_COLUMNS; b++) value[m][a][b] = activate<FUNCTION>(sum[a][b][m]);
  }

  // source (count, SOURCE_SIZE) -> target (count, TARGET_SIZE) and, for max, winners: which element of each window won
  static __device__ __forceinline__ void forward(const float* __restrict__ source, const float* __restrict__ weight,
                                                 const float* __restrict__ bias, float* __restrict__ target,
                                                 unsigned char* __restrict__ winners, int count) {
    static_assert(FORWARD_BYTES == 4 * (MAPS * TERMS + IMAGES * PADDED_SIZE), "weights and images");
    SHARED_LARGE(float, weights, FORWARD_BYTES / 4);
    float* images = weights + MAPS * TERMS;
    load_weights(weight, weights);
    clear_padding(images, IMAGES);
    for (int first = blockIdx.x * IMAGES; first < count; first += gridDim.x * IMAGES) {
      const int here = min(IMAGES, count - first);
      // the channels of all images are like those of one
      for (int i = threadIdx.x; i < here * SOURCE_SIZE; i += THREADS)
        images[in_padded(i)] = source[first * SOURCE_SIZE + i];
      __syncthreads();
      for (int job = threadIdx.x; job < here * ITEMS; job += THREADS) {
        const int image = job / ITEMS, item = job % ITEMS;
        float value[MAPS_EACH][WINDOW_ROWS][WINDOW_COLUMNS];
        activate_windows(images + image * PADDED_SIZE, weights, bias, item, value);
        UNROLL_FOR(int m = 0; m < MAPS_EACH; m++) {
          int winner;
          const int at = (first + image) * TARGET_SIZE + (item / OUT_AREA * MAPS_EACH + m) * OUT_AREA + item % OUT_AREA;
          target[at] = subsample_window<METHOD>(value[m], &winner);
          if (SUBSAMPLED && METHOD == MAX) winners[at] = (unsigned char)winner;
        }
      }
      __syncthreads();
    }
  }

  // The arrays of image n alone.
  static __device__ __forceinline__ ConvArrays image_of(const ConvArrays& all, int n) {
    return {all.source + n * SOURCE_SIZE,
            all.weight,
            all.bias,
            all.target + n * TARGET_SIZE,
            all.winners + n * TARGET_SIZE,
            all.target_errors + n * TARGET_SIZE,
            all.source_errors + n * SOURCE_SIZE,
            all.partials};
  }

  // deltas (MAPS, AREA) in shared memory = derivative of the loss by the convolution's sums, for one image.
  // The full-size error map exists only here. image and weights, in shared memory, are read only if RECOMPUTE.
  static __device__ __forceinline__ void unpool(const ConvArrays& one, const float* image, const float* weights,
                                                float* deltas) {
    for (int item = threadIdx.x; item < ITEMS; item += THREADS) {
      float value[MAPS_EACH][WINDOW_ROWS][WINDOW_COLUMNS];
      if (RECOMPUTE) activate_windows(image, weights, one.bias, item, value);
      const int window = item % OUT_AREA;
      const int y = window / OUT_COLUMNS * WINDOW_ROWS, x = window % OUT_COLUMNS * WINDOW_COLUMNS;
      UNROLL_FOR(int m = 0; m < MAPS_EACH; m++) {
        const int map = item / OUT_AREA * MAPS_EACH + m, at = map * OUT_AREA + window;
        const float error = one.target_errors[at];
        // for max the target is the winner's own activated value; the losers' derivatives are not needed
        const float winning = RECOMPUTE ? 0.0f : error * slope<FUNCTION>(one.target[at]);
        const int winner = SUBSAMPLED && METHOD == MAX ? one.winners[at] : 0;
        UNROLL_FOR(int a = 0; a < WINDOW_ROWS; a++)
          UNROLL_FOR(int b = 0; b < WINDOW_COLUMNS; b++) {
            float delta;
            if (RECOMPUTE)
              delta = error / float(WINDOW_SIZE) * slope<FUNCTION>(value[m][a][b]);
            else if (SUBSAMPLED && METHOD == MEAN)  // without activation the slope is 1 everywhere
              delta = error / float(WINDOW_SIZE);
            else
              delta = a * WINDOW_COLUMNS + b == winner ? winning : 0.0f;
            deltas[map * AREA + (y + a) * COLUMNS + x + b] = delta;
          }
      }
    }
  }

  // A row of the weight gradient is (map, channel, i): KERNEL_COLUMNS neighbouring weights, which see the same errors
  // and overlapping source values. SPLIT_K threads share one row, each taking every SPLIT_K-th row of positions.
  static constexpr int GRADIENT_ROWS = MAPS * CHANNELS * KERNEL_ROWS;
  static constexpr int M_TILE = ROWS_EACH * THREADS / SPLIT_K;  // rows a block owns
  static_assert(M_TILES * M_TILE >= GRADIENT_ROWS, "every row has a block");
  static_assert(PARTIAL_SIZE == MAPS * TERMS + MAPS, "a partial sum has a gradient of each weight and each bias");
  // For the source errors weights are held as (channel, i, j, map), maps filled up to whole float4s.
  static constexpr int MAP_FLOAT4S = ceil_div(MAPS, 4);
  static constexpr int HELD_WEIGHTS = TERMS * MAP_FLOAT4S * 4;
  // Shared memory of the backward pass, which needs one of these at a time: for the weight gradient, for adding up its
  // split sums, and for the source errors.
  static constexpr int WEIGHTS_FLOATS = PADDED_SIZE + MAPS * AREA + (RECOMPUTE ? MAPS * TERMS : 0);
  static constexpr int SPLIT_FLOATS = SPLIT_K > 1 ? THREADS * ROWS_EACH * (KERNEL_COLUMNS + 1) : 0;
  static constexpr int DATA_FLOATS =
      FIRST ? 0 : HELD_WEIGHTS + PADDED_SIZE + MAPS * AREA + (RECOMPUTE ? PADDED_SIZE + MAPS * TERMS : 0);
  static_assert(BACKWARD_BYTES >= 4 * WEIGHTS_FLOATS && BACKWARD_BYTES >= 4 * SPLIT_FLOATS &&
                    BACKWARD_BYTES >= 4 * DATA_FLOATS && BACKWARD_BYTES % 16 == 0,
                "arrays of the backward pass");

  // Group `group` of the partial sums, of images group, group + groups, ...; block `tile`'s rows of the gradient only.
  static __device__ __forceinline__ void backward_weights(const ConvArrays& arrays, float* arena, int count, int groups,
                                                          int group, int tile) {
    float* image = arena;
    float* deltas = image + PADDED_SIZE;
    float* weights = deltas + MAPS * AREA;
    const int split = threadIdx.x % SPLIT_K;
    const int row0 = tile * M_TILE + threadIdx.x / SPLIT_K;
    float sum[ROWS_EACH][KERNEL_COLUMNS + 1];  // the last one is the bias gradient's
    UNROLL_FOR(int owned = 0; owned < ROWS_EACH; owned++)
      UNROLL_FOR(int j = 0; j <= KERNEL_COLUMNS; j++) sum[owned][j] = 0.0f;
    if (RECOMPUTE) load_weights(arrays.weight, weights);
    clear_padding(image, 1);

    for (int n = group; n < count; n += groups) {
      __syncthreads();
      for (int i = threadIdx.x; i < SOURCE_SIZE; i += THREADS) image[in_padded(i)] = arrays.source[n * SOURCE_SIZE + i];
      if (RECOMPUTE) __syncthreads();
      unpool(image_of(arrays, n), image, weights, deltas);
      __syncthreads();
      UNROLL_FOR(int owned = 0; owned < ROWS_EACH; owned++) {
        const int row = row0 + owned * (THREADS / SPLIT_K);
        if (row >= GRADIENT_ROWS) break;
        const int map = row / (CHANNELS * KERNEL_ROWS), channel = row / KERNEL_ROWS % CHANNELS, i = row % KERNEL_ROWS;
        for (int y = split; y < ROWS; y += SPLIT_K) {
          const float* delta = deltas + map * AREA + y * COLUMNS;
          const float* values = image + (channel * PADDED_HEIGHT + y * STRIDE_ROWS + i) * PADDED_WIDTH;
          add_row_gradient<KERNEL_COLUMNS, STRIDE_COLUMNS>(sum[owned], delta, values, COLUMNS);
        }
      }
    }

    write_gradient_rows<THREADS, SPLIT_K, CHANNELS * KERNEL_ROWS, MAPS>(sum, row0, arena,
                                                                        arrays.partials + group * PARTIAL_SIZE);
  }

  static constexpr int HELD = MAP_FLOAT4S < 4 ? MAP_FLOAT4S : 4;  // float4s of errors that a pushing thread holds

  // Push: each unit of the convolution adds its error, weighted, to the units it saw. For one (i, j) no two units of
  // a channel reach the same source unit, so the sums need no atomics, and one barrier for each (i, j) fixes their
  // order.
  // A unit at the border also adds to units of the padding, whose errors are dropped: no unit has to find out.
  static __device__ __forceinline__ void push_errors(const float* deltas, const float* weights, float* errors) {
    for (int first = 0; first < CHANNELS * AREA; first += THREADS) {
      const int unit = first + threadIdx.x, channel = unit / AREA;
      const int y = unit % AREA / COLUMNS, x = unit % COLUMNS;
      const bool exists = unit < CHANNELS * AREA;
      for (int map0 = 0; map0 < MAPS; map0 += HELD * 4) {
        float delta[HELD * 4];
        UNROLL_FOR(int m = 0; m < HELD * 4; m++)
          delta[m] = exists && map0 + m < MAPS ? deltas[(map0 + m) * AREA + unit % AREA] : 0.0f;
        for (int i = 0; i < KERNEL_ROWS; i++)
          for (int j = 0; j < KERNEL_COLUMNS; j++) {
            if (exists) {
              const Float4* held = reinterpret_cast<const Float4*>(weights) +
                                   ((channel * KERNEL_ROWS + i) * KERNEL_COLUMNS + j) * MAP_FLOAT4S + map0 / 4;
              float sum = 0.0f;
              UNROLL_FOR(int m4 = 0; m4 < HELD; m4++) {
                if (map0 / 4 + m4 >= MAP_FLOAT4S) break;
                const Float4 four = held[m4];
                UNROLL_FOR(int m = 0; m < 4; m++) sum = fmaf(delta[m4 * 4 + m], four.at[m], sum);
              }
              errors[(channel * PADDED_HEIGHT + y * STRIDE_ROWS + i) * PADDED_WIDTH + x * STRIDE_COLUMNS + j] += sum;
            }
            __syncthreads();
          }
      }
    }
  }

  // Pull: each source unit gathers from the units that saw it. That needs no barriers, but every unit must find out
  // which windows it was in, and units at the border look for windows that do not exist. Errors of the padding are never asked for.
  static __device__ __forceinline__ void pull_errors(const float* deltas, const float* weights, float* errors) {
    for (int unit = threadIdx.x; unit < SOURCE_SIZE; unit += THREADS) {
      const int channel = unit / (HEIGHT * WIDTH), y = unit / WIDTH % HEIGHT, x = unit % WIDTH;
      float sum = 0.0f;
      for (int i = 0; i < KERNEL_ROWS; i++) {
        const int row = y + PADDING_ROWS - i;  // first row of the window, if there is one
        if (row < 0 || row % STRIDE_ROWS || row / STRIDE_ROWS >= ROWS) continue;
        for (int j = 0; j < KERNEL_COLUMNS; j++) {
          const int column = x + PADDING_COLUMNS - j;
          if (column < 0 || column % STRIDE_COLUMNS || column / STRIDE_COLUMNS >= COLUMNS) continue;
          const float* weight = weights + ((channel * KERNEL_ROWS + i) * KERNEL_COLUMNS + j) * MAP_FLOAT4S * 4;
          const float* delta = deltas + row / STRIDE_ROWS * COLUMNS + column / STRIDE_COLUMNS;
          for (int map = 0; map < MAPS; map++) sum = fmaf(delta[map * AREA], weight[map], sum);
        }
      }
      errors[in_padded(unit)] = sum;
    }
  }

  // The source errors of one image, by way of shared memory; pushed or pulled.
  template <bool PUSHED>
  static __device__ __forceinline__ void backward_data(const ConvArrays& one, float* arena) {
    float* held = arena;
    float* errors = held + HELD_WEIGHTS;
    float* deltas = errors + PADDED_SIZE;
    float* image = deltas + MAPS * AREA;
    float* weights = image + PADDED_SIZE;
    for (int i = threadIdx.x; i < HELD_WEIGHTS; i += THREADS) {
      const int map = i % (MAP_FLOAT4S * 4), term = i / (MAP_FLOAT4S * 4);
      held[i] = map < MAPS ? one.weight[map * TERMS + term] : 0.0f;
    }
    if (RECOMPUTE) load_weights(one.weight, weights);
    if (PUSHED)
      for (int i = threadIdx.x; i < PADDED_SIZE; i += THREADS) errors[i] = 0.0f;
    if (RECOMPUTE) {
      clear_padding(image, 1);
      for (int i = threadIdx.x; i < SOURCE_SIZE; i += THREADS) image[in_padded(i)] = one.source[i];
      __syncthreads();
    }
    unpool(one, image, weights, deltas);
    __syncthreads();
    if (PUSHED)
      push_errors(deltas, held, errors);
    else
      pull_errors(deltas, held, errors);
    __syncthreads();
    for (int i = threadIdx.x; i < SOURCE_SIZE; i += THREADS) one.source_errors[i] = errors[in_padded(i)];
    __syncthreads();
  }

  // The whole backward pass in one launch: blocks take jobs of two kinds, a group's share of the weight gradient or
  // one image's source errors, so that small batches fill the GPU too.
  static __device__ __forceinline__ void backward(const ConvArrays& arrays, int count, int groups) {
    SHARED_LARGE(Float4, float4_arena, BACKWARD_BYTES / 16);
    float* arena = reinterpret_cast<float*>(float4_arena);
    const int weight_jobs = groups * M_TILES, jobs = weight_jobs + (FIRST ? 0 : count);
    for (int job = blockIdx.x; job < jobs; job += gridDim.x) {
      if (job < weight_jobs)
        backward_weights(arrays, arena, count, groups, job / M_TILES, job % M_TILES);
      else
        backward_data<PUSH>(image_of(arrays, job - weight_jobs), arena);
      __syncthreads();
    }
  }

  // One of the two ways of the errors on its own, to be timed against the other.
  template <bool PUSHED>
  static __device__ __forceinline__ void backward_data_alone(const ConvArrays& arrays, int count) {
    SHARED_LARGE(Float4, float4_arena, BACKWARD_BYTES / 16);
    float* arena = reinterpret_cast<float*>(float4_arena);
    for (int n = blockIdx.x; n < count; n += gridDim.x) backward_data<PUSHED>(image_of(arrays, n), arena);
  }
};

}  // namespace fused

// backward: the weight gradient and the source errors. push_errors and pull_errors: the source errors alone.
#define FUSED_CONV_KERNELS(layer)                                                                                 \
  ENTRY_POINT(layer, forward)                                                                                     \
  (const float* __restrict__ source, const float* __restrict__ weight, const float* __restrict__ bias,            \
   float* __restrict__ target, unsigned char* __restrict__ winners, int count) {                                  \
    fused::Conv<layer>::forward(source, weight, bias, target, winners, count);                                    \
  }                                                                                                               \
  ENTRY_POINT(layer, backward)                                                                                    \
  (const float* __restrict__ source, const float* __restrict__ weight, const float* __restrict__ bias,            \
   const float* __restrict__ target, const unsigned char* __restrict__ winners,                                   \
   const float* __restrict__ target_errors, float* __restrict__ source_errors, float* __restrict__ partials,      \
   int count, int groups) {                                                                                       \
    fused::Conv<layer>::backward({source, weight, bias, target, winners, target_errors, source_errors, partials}, \
                                 count, groups);                                                                  \
  }                                                                                                               \
  ENTRY_POINT(layer, push_errors)                                                                                 \
  (const float* __restrict__ source, const float* __restrict__ weight, const float* __restrict__ bias,            \
   const float* __restrict__ target, const unsigned char* __restrict__ winners,                                   \
   const float* __restrict__ target_errors, float* __restrict__ source_errors, int count) {                       \
    fused::Conv<layer>::template backward_data_alone<true>(                                                       \
        {source, weight, bias, target, winners, target_errors, source_errors, nullptr}, count);                   \
  }                                                                                                               \
  ENTRY_POINT(layer, pull_errors)                                                                                 \
  (const float* __restrict__ source, const float* __restrict__ weight, const float* __restrict__ bias,            \
   const float* __restrict__ target, const unsigned char* __restrict__ winners,                                   \
   const float* __restrict__ target_errors, float* __restrict__ source_errors, int count) {                       \
    fused::Conv<layer>::template backward_data_alone<false>(                                                      \
        {source, weight, bias, target, winners, target_errors, source_errors, nullptr}, count);                   \
  }
