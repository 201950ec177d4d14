// Stage tuned: fully connected layer + bias + activation of few images by one block, without products of matrices: four
// inputs at a time, weights straight into the sums of all images. Where weights are far away, threads ask for more of
// them at once.
// Sizes is the Dense of the layer (dense.cuh), whose constants these are.
#pragma once
#include "context.cuh"
#include "tensor.cuh"

namespace tuned {

template <class Sizes, class Layer>
struct DenseByThreads {
  static constexpr int BLOCK = Sizes::BLOCK, WARPS = Sizes::WARPS;
  static constexpr int INPUTS = Sizes::INPUTS, UNITS = Sizes::UNITS, FUNCTION = Sizes::FUNCTION, IMAGES = Sizes::IMAGES;
  static constexpr int ROW = Sizes::ROW, SOURCE_PITCH = Sizes::SOURCE_PITCH, TARGET_PITCH = Sizes::TARGET_PITCH;
  static constexpr bool WEIGHTS_IN_GLOBAL = Sizes::WEIGHTS_IN_GLOBAL;

  static constexpr int INPUT_FLOAT4S = INPUTS / 4, LANE_FLOAT4S = ceil_div(INPUT_FLOAT4S, 32);
  static constexpr int UNIT_SHARES = INPUT_FLOAT4S < 1 || INPUT_FLOAT4S > BLOCK ? 1
                                     : BLOCK / INPUT_FLOAT4S < UNITS            ? BLOCK / INPUT_FLOAT4S
                                                                                : UNITS;
  static_assert(INPUTS % 4 == 0 && SOURCE_PITCH % 4 == 0 && (WEIGHTS_IN_GLOBAL || ROW % 4 == 0),
                "images, and weights in shared memory, come four at a time");
  static_assert(Layer::SCRATCH_FLOATS >= UNIT_SHARES * IMAGES * INPUTS, "shares of the source errors lie in Scratch");

  // Weights that a load takes: four, or as many as there are at such a boundary in device memory. Neighbouring threads
  // then load what is neighbouring, so that the four inputs of a thread lie apart.
  static constexpr int LOADED = !WEIGHTS_IN_GLOBAL || Layer::FIRST_WEIGHT % 4 == 0 ? 4
                                : Layer::FIRST_WEIGHT % 2 == 0                     ? 2
                                                                                   : 1;
  // Weights of how many units a thread asks for together on the way back: more where they are far away. Forward, of how
  // many times four units.
  static constexpr int AT_ONCE = WEIGHTS_IN_GLOBAL ? 16 : 4, UNITS_AT_ONCE = IMAGES == 1 ? 2 : 1;

  // Which input is number k of four number i.
  static __device__ __forceinline__ int input_of(int i, int k) {
    return (i + k / LOADED * INPUT_FLOAT4S) * LOADED + k % LOADED;
  }
  static __device__ __forceinline__ Float4 four_inputs(const float* source, int i) {
    if (LOADED == 4) return reinterpret_cast<const Float4*>(source)[i];
    Float4 four;
    UNROLL_FOR(int k = 0; k < 4; k++) four.at[k] = source[input_of(i, k)];
    return four;
  }
  static __device__ __forceinline__ Float4 four_weights(const float* weights, int unit, int i) {
    const float* row = weights + unit * ROW;
    if (!WEIGHTS_IN_GLOBAL) return reinterpret_cast<const Float4*>(row)[i];
    if (LOADED == 4) return load_l2(reinterpret_cast<const Float4*>(row) + i);
    Float4 four;
    if (LOADED == 2) {
      UNROLL_FOR(int k = 0; k < 4; k += 2) {
        const Pair pair = load_l2(reinterpret_cast<const Pair*>(row + input_of(i, k)));
        four.at[k] = pair.x, four.at[k + 1] = pair.y;
      }
    } else {
      UNROLL_FOR(int k = 0; k < 4; k++) four.at[k] = load_l2(row + input_of(i, k));
    }
    return four;
  }

  // A warp makes four units at a time, its lanes along the inputs.
  static __device__ __forceinline__ void forward(const float* source, const float* weights, float* target) {
    constexpr unsigned ALL = 0xffffffffu;
    const int lane = threadIdx.x % 32;
    constexpr Float4 NONE = {{0.0f, 0.0f, 0.0f, 0.0f}};
    Float4 value[IMAGES][LANE_FLOAT4S];
    UNROLL_FOR(int image = 0; image < IMAGES; image++)
      UNROLL_FOR(int n = 0; n < LANE_FLOAT4S; n++) {
        const int at = lane + n * 32;
        value[image][n] = at < INPUT_FLOAT4S ? four_inputs(source + image * SOURCE_PITCH, at) : NONE;
      }
#pragma unroll UNITS_AT_ONCE
    for (int first = threadIdx.x / 32 * 4; first < UNITS; first += WARPS * 4) {
      float sum[IMAGES][4] = {};
      UNROLL_FOR(int u = 0; u < 4; u++)
        UNROLL_FOR(int n = 0; n < LANE_FLOAT4S; n++) {
          const int at = lane + n * 32;
          const Float4 weight = at < INPUT_FLOAT4S ? four_weights(weights, min(first + u, UNITS - 1), at) : NONE;
          UNROLL_FOR(int image = 0; image < IMAGES; image++)
            UNROLL_FOR(int i = 0; i < 4; i++) sum[image][u] = fmaf(weight.at[i], value[image][n].at[i], sum[image][u]);
        }
      // each exchange halves what a lane has still to add up: first half the units, then a unit, then lanes
      const bool upper = lane & 16, odd = lane & 8;
      UNROLL_FOR(int image = 0; image < IMAGES; image++) {
        const float (&all)[4] = sum[image];
        float mine[2];
        UNROLL_FOR(int u = 0; u < 2; u++)
          mine[u] = (upper ? all[u + 2] : all[u]) + __shfl_xor_sync(ALL, upper ? all[u] : all[u + 2], 16);
        float total = (odd ? mine[1] : mine[0]) + __shfl_xor_sync(ALL, odd ? mine[0] : mine[1], 8);
        UNROLL_FOR(int bit = 4; bit; bit /= 2) total += __shfl_xor_sync(ALL, total, bit);
        const int unit = first + lane / 8;
        if (lane % 8 == 0 && unit < UNITS)
          target[image * TARGET_PITCH + unit] =
              activate<FUNCTION>(total + Sizes::weight_at(weights, UNITS * ROW + unit));
      }
    }
  }

  // A thread makes four inputs' errors, from a share of the units. scratch (UNIT_SHARES, IMAGES, INPUTS).
  static __device__ __forceinline__ void backward_data(const float* deltas, const float* weights, float* source_errors,
                                                       float* scratch) {
    for (int job = threadIdx.x; job < INPUT_FLOAT4S * UNIT_SHARES; job += BLOCK) {
      const int i = job % INPUT_FLOAT4S, share = job / INPUT_FLOAT4S;
      const int from = share * UNITS / UNIT_SHARES, to = (share + 1) * UNITS / UNIT_SHARES;
      Float4 sum[IMAGES] = {};
#pragma unroll AT_ONCE
      for (int u = from; u < to; u++) {
        const Float4 weight = four_weights(weights, u, i);
        UNROLL_FOR(int image = 0; image < IMAGES; image++) {
          const float delta = deltas[image * TARGET_PITCH + u];
          UNROLL_FOR(int k = 0; k < 4; k++) sum[image].at[k] = fmaf(weight.at[k], delta, sum[image].at[k]);
        }
      }
      UNROLL_FOR(int image = 0; image < IMAGES; image++)
        reinterpret_cast<Float4*>(scratch + (share * IMAGES + image) * INPUTS)[i] = sum[image];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < IMAGES * INPUTS; i += BLOCK) {
      float total = scratch[i];
      UNROLL_FOR(int share = 1; share < UNIT_SHARES; share++) total += scratch[share * IMAGES * INPUTS + i];
      const int image = IMAGES == 1 ? 0 : i / INPUTS, at = i - image * INPUTS;
      source_errors[image * SOURCE_PITCH + (LOADED == 4 ? at : input_of(at / 4, at % 4))] = total;
    }
  }
};

}  // namespace tuned
