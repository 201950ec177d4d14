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
  static constexpr int KERNEL = Layer::KERNEL, STRIDE = Layer::STRIDE;
  static constexpr int FUNCTION = Layer::FUNCTION;  // IDENTITY without activation
  static constexpr int WINDOW = Layer::WINDOW;      // 1 without subsampling
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

  static constexpr int AREA = ROWS * COLUMNS, TERMS = CHANNELS * KERNEL * KERNEL;
  static constexpr int SOURCE_SIZE = CHANNELS * HEIGHT * WIDTH;
  static constexpr int OUT_ROWS = ROWS / WINDOW, OUT_COLUMNS = COLUMNS / WINDOW;
  static constexpr int OUT_AREA = OUT_ROWS * OUT_COLUMNS, TARGET_SIZE = MAPS * OUT_AREA;
  static constexpr int ITEMS = MAPS / MAPS_EACH * OUT_AREA;  // windows x groups of maps: what a thread makes at a time

  // weights (TERMS, MAPS) in shared memory = transposed weight (MAPS, TERMS)
  static __device__ __forceinline__ void load_weights(const float* __restrict__ weight, float* weights) {
    for (int i = threadIdx.x; i < MAPS * TERMS; i += THREADS) weights[i % TERMS * MAPS + i / TERMS] = weight[i];
  }

  // Activated values of the windows of item (= group of maps, window), from a source image in shared memory.
  static __device__ __forceinline__ void activate_windows(const float* image, const float* weights,
                                                          const float* __restrict__ bias, int item,
                                                          float (&value)[MAPS_EACH][WINDOW][WINDOW]) {
    const int map = item / OUT_AREA * MAPS_EACH, y = item % OUT_AREA / OUT_COLUMNS;
    const int x = item % OUT_COLUMNS;
    const float* corner = image + y * WINDOW * STRIDE * WIDTH + x * WINDOW * STRIDE;
    float sum[WINDOW][WINDOW][MAPS_EACH];
    UNROLL_FOR(int m = 0; m < MAPS_EACH; m++)
      UNROLL_FOR(int a = 0; a < WINDOW; a++)
        UNROLL_FOR(int b = 0; b < WINDOW; b++) sum[a][b][m] = bias[map + m];
    convolve_window<CHANNELS, KERNEL, STRIDE, WINDOW, MAPS, MAPS_EACH>(
        sum, [&](int c, int a) { return corner + (c * HEIGHT + a) * WIDTH; }, weights + map);
    UNROLL_FOR(int m = 0; m < MAPS_EACH; m++)
      UNROLL_FOR(int a = 0; a < WINDOW; a++)
        UNROLL_FOR(int b = 0; b < WINDOW; b++) value[m][a][b] = activate<FUNCTION>(sum[a][b][m]);
  }

  // source (count, SOURCE_SIZE) -> target (count, TARGET_SIZE) and, for max, winners: which element of each window won
  static __device__ __forceinline__ void forward(const float* __restrict__ source, const float* __restrict__ weight,
                                                 const float* __restrict__ bias, float* __restrict__ target,
                                                 unsigned char* __restrict__ winners, int count) {
    static_assert(FORWARD_BYTES == 4 * (MAPS * TERMS + IMAGES * SOURCE_SIZE), "weights and images");
    SHARED_LARGE(float, weights, FORWARD_BYTES / 4);
    float* images = weights + MAPS * TERMS;
    load_weights(weight, weights);
    for (int first = blockIdx.x * IMAGES; first < count; first += gridDim.x * IMAGES) {
      const int here = min(IMAGES, count - first);
      for (int i = threadIdx.x; i < here * SOURCE_SIZE; i += THREADS) images[i] = source[first * SOURCE_SIZE + i];
      __syncthreads();
      for (int job = threadIdx.x; job < here * ITEMS; job += THREADS) {
        const int image = job / ITEMS, item = job % ITEMS;
        float value[MAPS_EACH][WINDOW][WINDOW];
        activate_windows(images + image * SOURCE_SIZE, weights, bias, item, value);
        UNROLL_FOR(int m = 0; m < MAPS_EACH; m++) {
          int winner;
          const int at = (first + image) * TARGET_SIZE + (item / OUT_AREA * MAPS_EACH + m) * OUT_AREA + item % OUT_AREA;
          target[at] = subsample_window<WINDOW, METHOD>(value[m], &winner);
          if (WINDOW > 1 && METHOD == MAX) winners[at] = (unsigned char)winner;
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
      float value[MAPS_EACH][WINDOW][WINDOW];
      if (RECOMPUTE) activate_windows(image, weights, one.bias, item, value);
      const int window = item % OUT_AREA;
      const int y = window / OUT_COLUMNS * WINDOW, x = window % OUT_COLUMNS * WINDOW;
      UNROLL_FOR(int m = 0; m < MAPS_EACH; m++) {
        const int map = item / OUT_AREA * MAPS_EACH + m, at = map * OUT_AREA + window;
        const float error = one.target_errors[at];
        // for max the target is the winner's own activated value; the losers' derivatives are not needed
        const float winning = RECOMPUTE ? 0.0f : error * slope<FUNCTION>(one.target[at]);
        const int winner = WINDOW > 1 && METHOD == MAX ? one.winners[at] : 0;
        UNROLL_FOR(int a = 0; a < WINDOW; a++)
          UNROLL_FOR(int b = 0; b < WINDOW; b++) {
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
  // overlapping source values. SPLIT_K threads share one row, each taking every SPLIT_K-th row of positions.
  static constexpr int GRADIENT_ROWS = MAPS * CHANNELS * KERNEL;
  static constexpr int M_TILE = ROWS_EACH * THREADS / SPLIT_K;  // rows a block owns
  static_assert(M_TILES * M_TILE >= GRADIENT_ROWS, "every row has a block");
  static_assert(PARTIAL_SIZE == MAPS * TERMS + MAPS, "a partial sum has a gradient of each weight and each bias");
  // For the source errors weights are held as (channel, i, j, map), maps filled up to whole float4s.
  static constexpr int MAP_FLOAT4S = ceil_div(MAPS, 4);
  static constexpr int HELD_WEIGHTS = TERMS * MAP_FLOAT4S * 4;
  // Shared memory of the backward pass, which needs one of these at a time: for the weight gradient, for adding up its
  // split sums, and for the source errors.
  static constexpr int WEIGHTS_FLOATS = SOURCE_SIZE + MAPS * AREA + (RECOMPUTE ? MAPS * TERMS : 0);
  static constexpr int SPLIT_FLOATS = SPLIT_K > 1 ? THREADS * ROWS_EACH * (KERNEL + 1) : 0;
  static constexpr int DATA_FLOATS =
      FIRST ? 0 : HELD_WEIGHTS + SOURCE_SIZE + MAPS * AREA + (RECOMPUTE ? SOURCE_SIZE + MAPS * TERMS : 0);
  static_assert(BACKWARD_BYTES >= 4 * WEIGHTS_FLOATS && BACKWARD_BYTES >= 4 * SPLIT_FLOATS &&
                    BACKWARD_BYTES >= 4 * DATA_FLOATS && BACKWARD_BYTES % 16 == 0,
                "arrays of the backward pass");

  // Group `group` of the partial sums, of images group, group + groups, ...; block `tile`'s rows of the gradient only.
  static __device__ __forceinline__ void backward_weights(const ConvArrays& arrays, float* arena, int count, int groups,
                                                          int group, int tile) {
    float* image = arena;
    float* deltas = image + SOURCE_SIZE;
    float* weights = deltas + MAPS * AREA;
    const int split = threadIdx.x % SPLIT_K;
    const int row0 = tile * M_TILE + threadIdx.x / SPLIT_K;
    float sum[ROWS_EACH][KERNEL + 1];  // the last one is the bias gradient's
    UNROLL_FOR(int owned = 0; owned < ROWS_EACH; owned++)
      UNROLL_FOR(int j = 0; j <= KERNEL; j++) sum[owned][j] = 0.0f;
    if (RECOMPUTE) load_weights(arrays.weight, weights);

    for (int n = group; n < count; n += groups) {
      __syncthreads();
      for (int i = threadIdx.x; i < SOURCE_SIZE; i += THREADS) image[i] = arrays.source[n * SOURCE_SIZE + i];
      if (RECOMPUTE) __syncthreads();
      unpool(image_of(arrays, n), image, weights, deltas);
      __syncthreads();
      UNROLL_FOR(int owned = 0; owned < ROWS_EACH; owned++) {
        const int row = row0 + owned * (THREADS / SPLIT_K);
        if (row >= GRADIENT_ROWS) break;
        const int map = row / (CHANNELS * KERNEL), channel = row / KERNEL % CHANNELS, i = row % KERNEL;
        for (int y = split; y < ROWS; y += SPLIT_K) {
          const float* delta = deltas + map * AREA + y * COLUMNS;
          const float* values = image + (channel * HEIGHT + y * STRIDE + i) * WIDTH;
          add_row_gradient<KERNEL, STRIDE>(sum[owned], delta, values, COLUMNS);
        }
      }
    }

    write_gradient_rows<THREADS, ROWS_EACH, SPLIT_K, KERNEL, CHANNELS, MAPS>(sum, row0, arena,
                                                                             arrays.partials + group * PARTIAL_SIZE);
  }

  static constexpr int HELD = MAP_FLOAT4S < 4 ? MAP_FLOAT4S : 4;  // float4s of errors that a pushing thread holds

  // Push: each unit of the convolution adds its error, weighted, to the units it saw. For one (i, j) no two units of
  // a channel reach the same source unit, so the sums need no atomics, and one barrier for each (i, j) fixes their
  // order.
  static __device__ __forceinline__ void push_errors(const float* deltas, const float* weights, float* errors) {
    for (int first = 0; first < CHANNELS * AREA; first += THREADS) {
      const int unit = first + threadIdx.x, channel = unit / AREA;
      const int y = unit % AREA / COLUMNS, x = unit % COLUMNS;
      const bool exists = unit < CHANNELS * AREA;
      for (int map0 = 0; map0 < MAPS; map0 += HELD * 4) {
        float delta[HELD * 4];
        UNROLL_FOR(int m = 0; m < HELD * 4; m++)
          delta[m] = exists && map0 + m < MAPS ? deltas[(map0 + m) * AREA + unit % AREA] : 0.0f;
        for (int i = 0; i < KERNEL; i++)
          for (int j = 0; j < KERNEL; j++) {
            if (exists) {
              const Float4* held = reinterpret_cast<const Float4*>(weights) +
                                   ((channel * KERNEL + i) * KERNEL + j) * MAP_FLOAT4S + map0 / 4;
              float sum = 0.0f;
              UNROLL_FOR(int m4 = 0; m4 < HELD; m4++) {
                if (map0 / 4 + m4 >= MAP_FLOAT4S) break;
                const Float4 four = held[m4];
                UNROLL_FOR(int m = 0; m < 4; m++) sum = fmaf(delta[m4 * 4 + m], four.at[m], sum);
              }
              errors[(channel * HEIGHT + y * STRIDE + i) * WIDTH + x * STRIDE + j] += sum;
            }
            __syncthreads();
          }
      }
    }
  }

  // Pull: each source unit gathers from the units that saw it. That needs no barriers, but every unit must find out
  // which windows it was in, and units at the border look for windows that do not exist.
  static __device__ __forceinline__ void pull_errors(const float* deltas, const float* weights, float* errors) {
    for (int unit = threadIdx.x; unit < SOURCE_SIZE; unit += THREADS) {
      const int channel = unit / (HEIGHT * WIDTH), y = unit / WIDTH % HEIGHT, x = unit % WIDTH;
      float sum = 0.0f;
      for (int i = 0; i < KERNEL; i++) {
        const int row = y - i;  // first source row of the window, if there is one
        if (row < 0 || row % STRIDE || row / STRIDE >= ROWS) continue;
        for (int j = 0; j < KERNEL; j++) {
          const int column = x - j;
          if (column < 0 || column % STRIDE || column / STRIDE >= COLUMNS) continue;
          const float* weight = weights + ((channel * KERNEL + i) * KERNEL + j) * MAP_FLOAT4S * 4;
          const float* delta = deltas + row / STRIDE * COLUMNS + column / STRIDE;
          for (int map = 0; map < MAPS; map++) sum = fmaf(delta[map * AREA], weight[map], sum);
        }
      }
      errors[unit] = sum;
    }
  }

  // The source errors of one image, by way of shared memory; pushed or pulled.
  template <bool PUSHED>
  static __device__ __forceinline__ void backward_data(const ConvArrays& one, float* arena) {
    float* held = arena;
    float* errors = held + HELD_WEIGHTS;
    float* deltas = errors + SOURCE_SIZE;
    float* image = deltas + MAPS * AREA;
    float* weights = image + SOURCE_SIZE;
    for (int i = threadIdx.x; i < HELD_WEIGHTS; i += THREADS) {
      const int map = i % (MAP_FLOAT4S * 4), term = i / (MAP_FLOAT4S * 4);
      held[i] = map < MAPS ? one.weight[map * TERMS + term] : 0.0f;
    }
    if (RECOMPUTE) load_weights(one.weight, weights);
    for (int i = threadIdx.x; i < SOURCE_SIZE; i += THREADS) {
      if (PUSHED) errors[i] = 0.0f;
      if (RECOMPUTE) image[i] = one.source[i];
    }
    if (RECOMPUTE) __syncthreads();
    unpool(one, image, weights, deltas);
    __syncthreads();
    if (PUSHED)
      push_errors(deltas, held, errors);
    else
      pull_errors(deltas, held, errors);
    __syncthreads();
    for (int i = threadIdx.x; i < SOURCE_SIZE; i += THREADS) one.source_errors[i] = errors[i];
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
