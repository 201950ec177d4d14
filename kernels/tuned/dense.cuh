// Stage tuned: fully connected layer + bias + activation of IMAGES images by one block, as products of matrices:
//   forward            (units, inputs) x (inputs, images)
//   backward_data      (inputs, units) x (units, images)
//   reduce_tile        (units, images) x (images, inputs), over the whole batch, in the second phase
// Layer has:
//   INPUTS, UNITS, FUNCTION (IDENTITY without activation), IMAGES
//   WEIGHTS_IN_GLOBAL: they are read from device memory; else they are in shared memory
//   WEIGHT_PITCH: floats from a unit's weights to the next one's in shared memory; even
//   ALIGNED: rows of weights begin at 16-byte boundaries in both memories
//   BY_THREADS: few images, whose numbers fit a warp's registers, are multiplied without tensor cores
//   FORWARD_SPLIT_K, DATA_SPLIT_K: warps that share the terms of one sum, in forward and backward_data
//   TRACE_SOURCE, TRACE_DELTA: where an image's trace keeps them
//   REDUCE_UNITS x REDUCE_INPUTS: a tile of the second phase
//   REDUCE_PITCH: floats from an image's deltas and sources to the next one's there
//   REDUCE_STAGES: depth of the cp.async pipeline there, in pieces of eight images that a warp has on their way
//   FIRST_WEIGHT: where the layer's numbers begin among the parameters
//   Buffers of all images: Source, Target, TargetErrors, SourceErrors (NoBuffer: nothing needs them), whose images lie
//   Source::PITCH and Target::PITCH floats apart, both even; and of the block: Scratch, Weights
//   SCRATCH_FLOATS, REDUCE_FLOATS: how large Scratch is, and the memory that the second phase may use
// weights: (UNITS, INPUTS), then bias (UNITS,).
// Source and its errors: (IMAGES, INPUTS); target and deltas: (IMAGES, UNITS).
#pragma once
#include "context.cuh"
#include "dense_by_threads.cuh"
#include "dense_update.cuh"
#include "reduce.cuh"
#include "tensor.cuh"

namespace tuned {

template <class Layer, class Threads, class Split = Split3xTF32>
struct Dense : LayerDefaults {
  using LayerDefaults::Accumulators;
  static constexpr int BLOCK = Threads::BLOCK, WARPS = Threads::WARPS;
  static constexpr int INPUTS = Layer::INPUTS, UNITS = Layer::UNITS, FUNCTION = Layer::FUNCTION, IMAGES = Layer::IMAGES;
  static constexpr bool WEIGHTS_IN_GLOBAL = Layer::WEIGHTS_IN_GLOBAL, ALIGNED = Layer::ALIGNED;
  static constexpr bool BY_THREADS = Layer::BY_THREADS;
  static constexpr int WEIGHT_PITCH = Layer::WEIGHT_PITCH;
  static constexpr int FORWARD_SPLIT_K = Layer::FORWARD_SPLIT_K, DATA_SPLIT_K = Layer::DATA_SPLIT_K;
  static constexpr int SOURCE_PITCH = Layer::Source::PITCH, TARGET_PITCH = Layer::Target::PITCH;

  static constexpr int ROW = WEIGHTS_IN_GLOBAL ? INPUTS : WEIGHT_PITCH;
  static constexpr int N_TILES = ceil_div(IMAGES, 8);
  // Sums that a warp makes side by side; where weights come from device memory, more loads must be on their way.
  static constexpr int SIDE_BY_SIDE = WEIGHTS_IN_GLOBAL ? 8 : 4;
  static constexpr int K_STEPS = SIDE_BY_SIDE / N_TILES < 1 ? 1 : SIDE_BY_SIDE / N_TILES;
  static constexpr int UNIT_TILES = ceil_div(UNITS, 16), INPUT_TILES = ceil_div(INPUTS, 16);
  static constexpr int UNIT_K_TILES = ceil_div(UNITS, 8), INPUT_K_TILES = ceil_div(INPUTS, 8);
  static constexpr int WIDE = N_TILES * 8;
  static constexpr bool SENDS_ERRORS_BACK = exists<typename Layer::SourceErrors>;
  static_assert(Split::K == 8, "tiles of eight terms");
  static_assert(SOURCE_PITCH % 2 == 0 && TARGET_PITCH % 2 == 0 && WEIGHT_PITCH % 2 == 0, "pairs are loaded as one");
  static_assert(SOURCE_PITCH >= INPUT_K_TILES * 8 && TARGET_PITCH >= UNIT_K_TILES * 8, "tiles lie within a row");
  static_assert(FORWARD_SPLIT_K <= INPUT_K_TILES && DATA_SPLIT_K <= UNIT_K_TILES, "every share has terms");
  static_assert(Layer::SCRATCH_FLOATS >= FORWARD_SPLIT_K * UNIT_TILES * 16 * WIDE, "forward's sums lie in Scratch");
  static_assert(DATA_SPLIT_K == 1 || Layer::SCRATCH_FLOATS >= DATA_SPLIT_K * INPUT_TILES * 16 * WIDE,
                "shares of the source errors lie in Scratch");

  static __device__ __forceinline__ const float* weights_of(const float* parameters, float* shared) {
    if constexpr (WEIGHTS_IN_GLOBAL)
      return parameters + Layer::FIRST_WEIGHT;
    else
      return Layer::Weights::all(shared);
  }

  // Weights into shared memory

  // They are there before the first image has come so far.
  static constexpr bool STREAMS = !WEIGHTS_IN_GLOBAL;
  // The weights as they lie, as one bulk copy: this many bytes, or 0 where rows lie apart.
  static constexpr int BULK_BYTES =
      STREAMS && ALIGNED && WEIGHT_PITCH == INPUTS ? UNITS * INPUTS * static_cast<int>(sizeof(float)) : 0;

  template <class Context>
  static __device__ __forceinline__ void copy_weights_in_bulk(Context& c) {
    if constexpr (BULK_BYTES > 0)
      copy_bulk(Layer::Weights::all(c.shared), c.parameters + Layer::FIRST_WEIGHT, UNITS * INPUTS, c.bulk_copies);
  }

  // Weights, if not in bulk, and bias.
  template <class Context>
  static __device__ __forceinline__ void stream_weights(Context& c) {
    if constexpr (STREAMS) {
      const float* parameters = c.parameters + Layer::FIRST_WEIGHT;
      float* weights = Layer::Weights::all(c.shared);
      constexpr int ROW_FLOAT4S = INPUTS < 4 ? 1 : INPUTS / 4;
      if (ALIGNED && !BULK_BYTES) {
#pragma unroll 4
        for (int i = threadIdx.x; i < UNITS * ROW_FLOAT4S; i += BLOCK)
          copy_async(reinterpret_cast<Float4*>(weights + i / ROW_FLOAT4S * WEIGHT_PITCH) + i % ROW_FLOAT4S,
                     reinterpret_cast<const Float4*>(parameters) + i);
      } else if (!BULK_BYTES) {
        for (int i = threadIdx.x; i < UNITS * INPUTS; i += BLOCK)
          copy_async(weights + i / INPUTS * WEIGHT_PITCH + i % INPUTS, parameters + i);
      }
      for (int i = threadIdx.x; i < UNITS; i += BLOCK)
        copy_async(weights + UNITS * WEIGHT_PITCH + i, parameters + UNITS * INPUTS + i);
      // what lies between a row's inputs and its last eight is multiplied too
      constexpr int REST = (INPUT_K_TILES * 8 < WEIGHT_PITCH ? INPUT_K_TILES * 8 : WEIGHT_PITCH) - INPUTS;
      for (int i : block_range(UNITS * REST))
        weights[i / max(1, REST) * WEIGHT_PITCH + INPUTS + i % max(1, REST)] = 0.0f;
    }
  }

  static constexpr bool ONE_WARP_COPIES = BULK_BYTES > 0;
  // Weights and bias, by one warp.
  template <class Context>
  static __device__ __forceinline__ void copy_weights_by_warp(Context& c) {
    const float* parameters = c.parameters + Layer::FIRST_WEIGHT;
    float* weights = Layer::Weights::all(c.shared);
    copy_bulk_by_warp(weights, parameters, UNITS * INPUTS, c.bulk_copies);
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < UNITS; i += 32)
      copy_async(weights + UNITS * WEIGHT_PITCH + i, parameters + UNITS * INPUTS + i);
  }

  static __device__ __forceinline__ float weight_at(const float* weights, int i) {
    return WEIGHTS_IN_GLOBAL ? load_l2(weights + i) : weights[i];
  }

  // Two neighbouring weights of a unit.
  static __device__ __forceinline__ Pair weights_at(const float* weights, int unit, int input) {
    const int at = min(unit, UNITS - 1) * ROW + input;
    if (!WEIGHTS_IN_GLOBAL) return *reinterpret_cast<const Pair*>(weights + at);
    return {input < INPUTS ? load_l2(weights + at) : 0.0f, input + 1 < INPUTS ? load_l2(weights + at + 1) : 0.0f};
  }

  // sum[0] += the others: sums that did not have to wait for each other.
  template <int STEPS>
  static __device__ __forceinline__ void add_up(Fragment (&sum)[STEPS][N_TILES]) {
    UNROLL_FOR(int m = 1; m < STEPS; m++)
      UNROLL_FOR(int n = 0; n < N_TILES; n++)
        UNROLL_FOR(int i = 0; i < 4; i++) sum[0][n].at[i] += sum[m][n].at[i];
  }

  // Few images have little for a product of matrices.
  using ByThreads = DenseByThreads<Dense, Layer>;

  // Forward

  template <class Context>
  static __device__ __forceinline__ void forward(Context& c, int) {
    float* const shared = c.shared;
    float* const source = Layer::Source::all(shared);
    float* const target = Layer::Target::all(shared);
    const float* const weights = weights_of(c.parameters, shared);
    pad(source);
    __syncthreads();
    if constexpr (BY_THREADS)
      ByThreads::forward(source, weights, target);
    else
      forward_batch(source, weights, target, Layer::Scratch::all(shared));
  }

  // What lies beyond the inputs is multiplied too; a barrier before forward.
  static __device__ __forceinline__ void pad(float* source) {
    constexpr int REST = INPUT_K_TILES * 8 - INPUTS;
    for (int i : block_range(IMAGES * REST)) source[i / max(1, REST) * SOURCE_PITCH + INPUTS + i % max(1, REST)] = 0.0f;
  }

  // Weights in device memory: one Float4 (two pairs of terms) a lane, prefetched while those before are multiplied.
  // Only tensor cores ask each lane for its own numbers alone.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  static constexpr bool PREFETCHES = false;
#else
  static constexpr bool PREFETCHES = WEIGHTS_IN_GLOBAL && ALIGNED && K_STEPS > 1;
#endif

  // sum += a share of the products of 16 units, from unit0 on, and all images.
  static __device__ __forceinline__ void multiply_prefetched(const float* source, const float* weights, int unit0,
                                                             int share, Fragment (&sum)[K_STEPS][N_TILES]) {
    constexpr int FOURS = K_STEPS > 1 ? K_STEPS / 2 : 1;
    constexpr int DOUBLE_K_TILES = ceil_div(INPUTS, 16);
    Float4 coming[FOURS][2];
    const auto fetch = [&](int first) {
      UNROLL_FOR(int m = 0; m < FOURS; m++)
        UNROLL_FOR(int lower = 0; lower < 2; lower++) {
          const int lane = threadIdx.x % 32, unit = min(unit0 + lane / 4 + lower * 8, UNITS - 1);
          const int input = (first + m * FORWARD_SPLIT_K) * 16 + lane % 4 * 4;
          coming[m][lower] = input < INPUTS ? load_l2(reinterpret_cast<const Float4*>(weights + unit * INPUTS + input))
                                            : Float4{{0.0f, 0.0f, 0.0f, 0.0f}};
        }
    };
    fetch(share);
#pragma unroll 2
    for (int first = share; first < DOUBLE_K_TILES; first += FORWARD_SPLIT_K * FOURS) {
      Float4 here[FOURS][2];
      UNROLL_FOR(int m = 0; m < FOURS; m++) here[m][0] = coming[m][0], here[m][1] = coming[m][1];
      fetch(first + FORWARD_SPLIT_K * FOURS);
      Split::template multiply<true>(
          sum,
          [&](int m, int row, int pair) -> Pair {
#ifdef __CUDA_ARCH__
            const Float4& four = here[m / 2][row < 8 ? 0 : 1];  // the lane's own
            return {four.at[m % 2 * 2], four.at[m % 2 * 2 + 1]};
#else
            const int unit = min(unit0 + row, UNITS - 1);
            const int input = (first + m / 2 * FORWARD_SPLIT_K) * 16 + pair * 4 + m % 2 * 2;
            const float* weight = weights + unit * INPUTS + input;
            return input < INPUTS ? Pair{weight[0], weight[1]} : Pair{0.0f, 0.0f};
#endif
          },
          [&](int m, int n, int pair, int image) -> Pair {
            const int input = min((first + m / 2 * FORWARD_SPLIT_K) * 16 + pair * 4 + m % 2 * 2, INPUT_K_TILES * 8 - 2);
            return *reinterpret_cast<const Pair*>(source + min(n * 8 + image, IMAGES - 1) * SOURCE_PITCH + input);
          });
    }
  }

  // target = f(weights source + bias). scratch: FORWARD_SPLIT_K * UNIT_TILES * 16 * WIDE floats.
  static __device__ __forceinline__ void forward_batch(const float* source, const float* weights, float* target,
                                                       float* scratch) {
    constexpr int HIGH = UNIT_TILES * 16;
    for (int task = threadIdx.x / 32; task < UNIT_TILES * FORWARD_SPLIT_K; task += WARPS) {
      const int share = task / UNIT_TILES, unit0 = task % UNIT_TILES * 16;
      Fragment sum[K_STEPS][N_TILES];
      ::clear(sum);
      if (PREFETCHES) multiply_prefetched(source, weights, unit0, share, sum);
      for (int k = share; !PREFETCHES && k < INPUT_K_TILES; k += FORWARD_SPLIT_K * K_STEPS)
        Split::template multiply<true>(
            sum,
            [&](int m, int row, int pair) -> Pair {
              const int at = k + m * FORWARD_SPLIT_K;
              return at < INPUT_K_TILES ? weights_at(weights, unit0 + row, at * 8 + pair * 2) : Pair{0.0f, 0.0f};
            },
            [&](int m, int n, int pair, int image) -> Pair {
              const int at = min(k + m * FORWARD_SPLIT_K, INPUT_K_TILES - 1);
              return *reinterpret_cast<const Pair*>(source + min(n * 8 + image, IMAGES - 1) * SOURCE_PITCH + at * 8 +
                                                    pair * 2);
            });
      add_up(sum);
      UNROLL_FOR(int n = 0; n < N_TILES; n++)
        UNROLL_FOR(int i = 0; i < 4; i++)
          scratch[(share * HIGH + unit0 + tile_row(i)) * WIDE + n * 8 + tile_column(i)] = sum[0][n].at[i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < UNITS * IMAGES; i += BLOCK) {
      const int unit = i / IMAGES, image = i % IMAGES;
      float total = weight_at(weights, UNITS * ROW + unit);
      UNROLL_FOR(int share = 0; share < FORWARD_SPLIT_K; share++)
        total += scratch[(share * HIGH + unit) * WIDE + image];
      target[image * TARGET_PITCH + unit] = activate<FUNCTION>(total);
    }
  }

  // Backward

  template <class Context>
  static __device__ __forceinline__ void backward(Context& c, int, Accumulators&) {
    float* const shared = c.shared;
    float* const errors = Layer::TargetErrors::all(shared);
    const float* const weights = weights_of(c.parameters, shared);
    leave_trace(Layer::Source::all(shared), Layer::Target::all(shared), errors, c.trace, c.trace_stride, c.here);
    if constexpr (SENDS_ERRORS_BACK) {
      __syncthreads();
      float* source_errors = Layer::SourceErrors::all(shared);
      float* scratch = Layer::Scratch::all(shared);
      if constexpr (BY_THREADS)
        ByThreads::backward_data(errors, weights, source_errors, scratch);
      else if constexpr (WIDE_BACK)
        backward_data_wide(errors, weights, source_errors);
      else
        backward_data(errors, weights, source_errors, scratch);
    }
  }

  // How many deltas of an image its trace keeps: what is stamped is waited for up to whole tiles.
  template <class Row>
  static constexpr int LEFT_UNITS = std::is_same<Row, StampedRow>::value ? UNIT_K_TILES * 8 : UNITS;

  // errors (IMAGES, UNITS) *= slope, so that they are the derivative by the sums; the traces of the first `here`
  // images, `stride` floats apart, keep them, and the sources.
  template <class Row>
  static __device__ __forceinline__ void leave_trace(const float* source, const float* target, float* errors, Row trace,
                                                     int stride, int here) {
#pragma unroll 1
    for (int i = threadIdx.x; i < here * INPUTS; i += BLOCK)
      trace[i / INPUTS * stride + Layer::TRACE_SOURCE + i % INPUTS] = source[i / INPUTS * SOURCE_PITCH + i % INPUTS];
#pragma unroll 1
    for (int i = threadIdx.x; i < IMAGES * UNIT_K_TILES * 8; i += BLOCK) {
      const int image = i / (UNIT_K_TILES * 8), unit = i % (UNIT_K_TILES * 8), at = image * TARGET_PITCH + unit;
      const float delta = unit < UNITS && image < here ? errors[at] * slope<FUNCTION>(target[at]) : 0.0f;
      errors[at] = delta;
      if (unit < LEFT_UNITS<Row> && image < here) trace[image * stride + Layer::TRACE_DELTA + unit] = delta;
    }
  }

  // Which of a tile's 32 inputs from `input0` on are the four of the lanes' group `eighth`: number k of them. They are
  // neighbours as far as their row is aligned, so that a lane has them by one load, or two, or four.
  static constexpr int ROW_LOADED = Layer::FIRST_WEIGHT % 4 == 0 && INPUTS % 4 == 0   ? 4
                                    : Layer::FIRST_WEIGHT % 2 == 0 && INPUTS % 2 == 0 ? 2
                                                                                      : 1;
  static __device__ __forceinline__ int back_input(int input0, int eighth, int k) {
    return input0 + (k / ROW_LOADED * 8 + eighth) * ROW_LOADED + k % ROW_LOADED;
  }
  // The weights of a unit that belong to them; zeros beyond.
  static __device__ __forceinline__ Float4 back_weights(const float* weights, int unit, int input0, int eighth) {
    const float* row = weights + unit * INPUTS;
    Float4 four = {{0.0f, 0.0f, 0.0f, 0.0f}};
    if (unit >= UNITS) return four;
    if (ROW_LOADED == 4) {
      const int input = back_input(input0, eighth, 0);
      if (input < INPUTS) four = load_l2(reinterpret_cast<const Float4*>(row + input));
    } else if (ROW_LOADED == 2) {
      UNROLL_FOR(int k = 0; k < 4; k += 2) {
        const int input = back_input(input0, eighth, k);
        const Pair pair = input < INPUTS ? load_l2(reinterpret_cast<const Pair*>(row + input)) : Pair{0.0f, 0.0f};
        four.at[k] = pair.x, four.at[k + 1] = pair.y;
      }
    } else {
      UNROLL_FOR(int k = 0; k < 4; k++) {
        const int input = back_input(input0, eighth, k);
        if (input < INPUTS) four.at[k] = load_l2(row + input);
      }
    }
    return four;
  }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  static constexpr bool WIDE_BACK = false;  // for the reason of PREFETCHES
#else
  static constexpr bool WIDE_BACK = WEIGHTS_IN_GLOBAL && DATA_SPLIT_K == 1 && ceil_div(INPUTS, 32) >= WARPS;
#endif

  // As backward_data, by weights in device memory, if all warps have something to do. A warp makes two tiles of 16 inputs,
  // whose rows are taken as loads of four weights want them; more sums side by side than BACK_STEPS would need more
  // registers than there are.
  static constexpr int BACK_STEPS = K_STEPS < 4 ? K_STEPS : 4;
  static __device__ __forceinline__ void backward_data_wide(const float* deltas, const float* weights,
                                                            float* source_errors) {
    const int own_eighth = threadIdx.x % 32 / 4, own_pair = threadIdx.x % 4;
    for (int task = threadIdx.x / 32; task < ceil_div(INPUTS, 32); task += WARPS) {
      const int input0 = task * 32;
      Fragment sum[2][BACK_STEPS][N_TILES];
      UNROLL_FOR(int tile = 0; tile < 2; tile++) ::clear(sum[tile]);
#pragma unroll 1
      for (int k = 0; k < UNIT_K_TILES; k += BACK_STEPS) {
        Float4 here[BACK_STEPS][2];
        UNROLL_FOR(int m = 0; m < BACK_STEPS; m++)
          UNROLL_FOR(int half = 0; half < 2; half++)
            here[m][half] = back_weights(weights, (k + m) * 8 + own_pair + half * 4, input0, own_eighth);
        UNROLL_FOR(int tile = 0; tile < 2; tile++)
          Split::template multiply<true>(
              sum[tile],
              [&](int m, int row, int pair) -> Pair {
                const int number = tile * 2 + row / 8;
#ifdef __CUDA_ARCH__
                return {here[m][0].at[number], here[m][1].at[number]};  // the lane's own
#else
                const int unit = (k + m) * 8 + pair, input = back_input(input0, row % 8, number);
                const auto weight = [&](int u) {
                  return u < UNITS && input < INPUTS ? weights[u * INPUTS + input] : 0.0f;
                };
                return {weight(unit), weight(unit + 4)};
#endif
              },
              [&](int m, int n, int pair, int image) -> Pair {
                const int at = min(k + m, UNIT_K_TILES - 1);
                const float* delta = deltas + min(n * 8 + image, IMAGES - 1) * TARGET_PITCH + at * 8 + pair;
                return {delta[0], delta[4]};
              });
      }
      UNROLL_FOR(int tile = 0; tile < 2; tile++) {
        add_up(sum[tile]);
        UNROLL_FOR(int n = 0; n < N_TILES; n++)
          UNROLL_FOR(int i = 0; i < 4; i++) {
            const int input = back_input(input0, own_eighth, tile * 2 + i / 2), image = n * 8 + tile_column(i);
            if (input >= INPUTS) continue;
            if (image < IMAGES) source_errors[image * SOURCE_PITCH + input] = sum[tile][0][n].at[i];
          }
      }
    }
  }

  // source_errors = transposed weights x deltas. scratch: DATA_SPLIT_K * INPUT_TILES * 16 * WIDE floats if
  // DATA_SPLIT_K > 1.
  static __device__ __forceinline__ void backward_data(const float* deltas, const float* weights, float* source_errors,
                                                       float* scratch) {
    constexpr int HIGH = INPUT_TILES * 16;
    for (int task = threadIdx.x / 32; task < INPUT_TILES * DATA_SPLIT_K; task += WARPS) {
      const int share = task / INPUT_TILES, input0 = task % INPUT_TILES * 16;
      Fragment sum[K_STEPS][N_TILES];
      ::clear(sum);
      for (int k = share; k < UNIT_K_TILES; k += DATA_SPLIT_K * K_STEPS)
        // units pair and pair + 4: neighbours would meet in one bank
        Split::template multiply<true>(
            sum,
            [&](int m, int row, int pair) -> Pair {
              const int unit = (k + m * DATA_SPLIT_K) * 8 + pair, input = min(input0 + row, INPUTS - 1);
              return {unit < UNITS ? weight_at(weights, unit * ROW + input) : 0.0f,
                      unit + 4 < UNITS ? weight_at(weights, (unit + 4) * ROW + input) : 0.0f};
            },
            [&](int m, int n, int pair, int image) -> Pair {
              const int at = min(k + m * DATA_SPLIT_K, UNIT_K_TILES - 1);
              const float* delta = deltas + min(n * 8 + image, IMAGES - 1) * TARGET_PITCH + at * 8 + pair;
              return {delta[0], delta[4]};
            });
      add_up(sum);
      UNROLL_FOR(int n = 0; n < N_TILES; n++)
        UNROLL_FOR(int i = 0; i < 4; i++) {
          const int input = input0 + tile_row(i), image = n * 8 + tile_column(i);
          if (DATA_SPLIT_K > 1)
            scratch[(share * HIGH + input) * WIDE + image] = sum[0][n].at[i];
          else if (input < INPUTS && image < IMAGES)
            source_errors[image * SOURCE_PITCH + input] = sum[0][n].at[i];
        }
    }
    if (DATA_SPLIT_K == 1) return;
    __syncthreads();
    for (int i = threadIdx.x; i < INPUTS * IMAGES; i += BLOCK) {
      const int input = i / IMAGES, image = i % IMAGES;
      float total = scratch[input * WIDE + image];
      UNROLL_FOR(int share = 1; share < DATA_SPLIT_K; share++) total += scratch[(share * HIGH + input) * WIDE + image];
      source_errors[image * SOURCE_PITCH + input] = total;
    }
  }

  // Second phase: dense_update.cuh.

  static constexpr int TILES_WIDE = ceil_div(INPUTS, Layer::REDUCE_INPUTS),
                       TILES = TILES_WIDE * ceil_div(UNITS, Layer::REDUCE_UNITS);
  static_assert(Layer::REDUCE_FLOATS >= WARPS * Layer::REDUCE_STAGES * 8 * Layer::REDUCE_PITCH,
                "all warps' stages lie in shared memory");

  static constexpr DenseSizes SIZES = {
      INPUTS, UNITS, TILES_WIDE, Layer::TRACE_SOURCE, Layer::TRACE_DELTA, Layer::FIRST_WEIGHT};
  template <int TRACE>
  using UpdateOf = DenseUpdate<Threads, Split, TRACE, Layer::REDUCE_PITCH, Layer::REDUCE_STAGES>;
};

}  // namespace tuned
