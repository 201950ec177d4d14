// Stage tuned, second phase of dense layers: the gradient is deltas^T x sources over the batch, in tiles of UNITS x INPUTS
// weights; a block makes one tile at a time. Its warps share the images (split-K), eight at a time.
//   Behind a barrier of the grid each warp has a pipeline of STAGES on their way into shared memory (cp.async, as
//   CUTLASS's multistage pipelines of Ampere): rows of deltas and sources, an odd number of Float4s of banks apart.
//   Stamped numbers are waited for by the lanes, which bring them there.
#pragma once
#include <type_traits>

#include "reduce.cuh"
#include "tensor.cuh"

namespace tuned {

// A layer's sizes and places: one function serves all layers.
struct DenseSizes {
  int inputs, units;
  int tiles_wide;                 // of tiles side by side along the inputs
  int trace_source, trace_delta;  // where an image's trace keeps them
  int first_weight;               // where the layer's numbers begin among the parameters
};

// PITCH: floats from an image's deltas and sources to the next one's. TRACE: floats of an image's trace.
template <class Threads, class Split, int TRACE, int PITCH, int STAGES>
struct DenseUpdate {
  static constexpr int BLOCK = Threads::BLOCK, WARPS = Threads::WARPS;
  static constexpr int TILE_UNITS = 16, TILE_INPUTS = 32;
  static constexpr int STAGE = 8 * PITCH, WARP_STAGES = STAGES * STAGE, SUM_PITCH = TILE_INPUTS + 8;
  static_assert(PITCH >= TILE_UNITS + TILE_INPUTS && PITCH % 8 == 0, "rows of Float4s");
  static_assert(STAGES % 2 == 0, "two are multiplied at a time");
  static_assert(WARP_STAGES >= TILE_UNITS * (SUM_PITCH + 1), "a warp's sums lie where its stages were");

  // A lane's part of what a tile takes of eight images' traces.
  template <class Number>
  struct Fetch {
    static constexpr int ROW_FLOAT4S = (TILE_UNITS + TILE_INPUTS) / 4, DELTA_FLOAT4S = TILE_UNITS / 4;
    static constexpr int OWN = 8 * ROW_FLOAT4S / 32;
    // What lies between a layer's inputs and its last eight is there as zeros, but never stamped.
    static constexpr int INPUTS_TOGETHER = std::is_same<Number, float>::value ? 8 : 4;
    const Number* from[OWN];  // of the first eight
    int image[OWN], offset[OWN];
    bool there[OWN];

    __device__ __forceinline__ Fetch(const DenseSizes& sizes, const Number* traces, int unit0, int input0) {
      UNROLL_FOR(int n = 0; n < OWN; n++) {
        const int i = threadIdx.x % 32 + n * 32, four = i % ROW_FLOAT4S;
        const int unit = unit0 + four * 4, input = input0 + (four - DELTA_FLOAT4S) * 4;
        image[n] = i / ROW_FLOAT4S;
        offset[n] = image[n] * PITCH + four * 4;
        there[n] = four < DELTA_FLOAT4S ? unit < ceil_div(sizes.units, 8) * 8
                                        : input < ceil_div(sizes.inputs, INPUTS_TOGETHER) * INPUTS_TOGETHER;
        from[n] =
            traces + image[n] * TRACE + (four < DELTA_FLOAT4S ? sizes.trace_delta + unit : sizes.trace_source + input);
      }
    }

    // By all lanes of a warp; zeros for images from `count` on.
    __device__ __forceinline__ void operator()(int eight, int count, float* stage) const {
      UNROLL_FOR(int n = 0; n < OWN; n++)
        copy_async_or_zero(reinterpret_cast<Float4*>(stage + offset[n]),
                           reinterpret_cast<const Float4*>(from[n] + static_cast<long long>(eight) * 8 * TRACE),
                           there[n] && eight * 8 + image[n] < count);
    }

    // The same, of numbers that are waited for.
    __device__ __forceinline__ void take(int eight, int count, float* stage, unsigned stamp, Patience& patience) const {
      float value[OWN * 4];
      take_stamped(
          value,
          [&](int i) -> const Stamped* {
            const int n = i / 4;
            const bool any = there[n] && eight * 8 + image[n] < count;
            return any ? from[n] + static_cast<long long>(eight) * 8 * TRACE + i % 4 : nullptr;
          },
          stamp, patience);
      UNROLL_FOR(int i = 0; i < OWN * 4; i++) stage[offset[i / 4] + i % 4] = value[i];
    }
  };

  // shared: WARPS * WARP_STAGES floats.
  template <class Gradients>
  static __device__ __forceinline__ void reduce_tile(const DenseSizes& sizes, int tile, Gradients& gradients,
                                                     float* shared, const Update& all) {
    const Update update = all.from(sizes.first_weight);
    const int count = gradients.count;
    constexpr int OWN = ceil_div(TILE_UNITS * TILE_INPUTS, BLOCK);  // weights of a thread
    const int unit0 = tile / sizes.tiles_wide * TILE_UNITS, input0 = tile % sizes.tiles_wide * TILE_INPUTS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int unit = unit0 + static_cast<int>(threadIdx.x);  // whose bias the thread has, if any
    const bool has_bias = input0 == 0 && threadIdx.x < TILE_UNITS && unit < sizes.units;
    float* own = shared + warp * WARP_STAGES;
    const int eights = (count + 7) / 8, sharing = min(WARPS, eights);
    const Fetch<typename Gradients::Number> fetch(sizes, gradients.traces(), unit0, input0);
    if constexpr (!Gradients::STAMPED) {
      if (warp < sharing)
#pragma unroll 1
        for (int stage = 0; stage < STAGES; stage++) {
          // the second of two is multiplied whether there is any or not
          if (warp + stage / 2 * 2 * WARPS < eights) fetch(warp + stage * WARPS, count, own + stage * STAGE);
          end_group_of_copies();
        }
    }

    Update::Weight now[OWN], bias;
    const auto weight_of = [&](int n) {  // the n-th weight of the thread; -1: there is none
      const int i = threadIdx.x + n * BLOCK;
      const int u = unit0 + i / TILE_INPUTS, input = input0 + i % TILE_INPUTS;
      return i < TILE_UNITS * TILE_INPUTS && u < sizes.units && input < sizes.inputs ? u * sizes.inputs + input : -1;
    };
    UNROLL_FOR(int n = 0; n < OWN; n++)
      if (weight_of(n) >= 0) now[n] = update.fetch(weight_of(n));
    if (has_bias) bias = update.fetch(sizes.units * sizes.inputs + unit);

    if (warp < sharing) {
      Fragment sum[1][4];
      ::clear(sum);
      float delta_sum[2] = {0.0f, 0.0f};
      const auto multiply = [&](const float* rows) {
        const auto both = [&](int pair, int at) -> Pair {
          return {rows[pair * PITCH + at], rows[(pair + 4) * PITCH + at]};
        };
        if (input0 == 0) {  // the bias is the weight of an input that is always 1
          UNROLL_FOR(int upper = 0; upper < 2; upper++) {
            const Pair two = both(lane % 4, lane / 4 + upper * 8);
            delta_sum[upper] += two.x + two.y;
          }
        }
        Split::template multiply<false>(
            sum, [&](int, int row, int pair) { return both(pair, row); },
            [&](int, int n, int pair, int column) { return both(pair, TILE_UNITS + n * 8 + column); });
      };
      if constexpr (Gradients::STAMPED) {
#pragma unroll 1
        for (int eight = warp; eight < eights; eight += WARPS) {
          fetch.take(eight, count, own, gradients.stamp, gradients.patience);
          __syncwarp();
          multiply(own);
          __syncwarp();
        }
      } else {
        for (int eight = warp, stage = 0; eight < eights; eight += 2 * WARPS, stage = (stage + 2) % STAGES) {
          wait_for_groups<STAGES - 2>();
          __syncwarp();
          UNROLL_FOR(int half = 0; half < 2; half++) multiply(own + (stage + half) * STAGE);
          __syncwarp();
          UNROLL_FOR(int half = 0; half < 2; half++) {
            if (eight + STAGES * WARPS < eights)
              fetch(eight + (STAGES + half) * WARPS, count, own + (stage + half) * STAGE);
            end_group_of_copies();
          }
        }
      }
      // over the warp's stages: sums (TILE_UNITS, SUM_PITCH), then of the deltas (TILE_UNITS,)
      UNROLL_FOR(int n = 0; n < 4; n++)
        UNROLL_FOR(int i = 0; i < 4; i++) own[tile_row(i) * SUM_PITCH + n * 8 + tile_column(i)] = sum[0][n].at[i];
      UNROLL_FOR(int upper = 0; upper < 2; upper++) {
        UNROLL_FOR(int bit = 1; bit < 4; bit *= 2)
          delta_sum[upper] += __shfl_xor_sync(0xffffffffu, delta_sum[upper], bit);
        if (lane % 4 == 0) own[TILE_UNITS * SUM_PITCH + lane / 4 + upper * 8] = delta_sum[upper];
      }
    }
    __syncthreads();
    UNROLL_FOR(int n = 0; n < OWN; n++) {
      if (weight_of(n) < 0) continue;
      const int i = threadIdx.x + n * BLOCK;
      float total = 0.0f;
      for (int other = 0; other < sharing; other++)
        total += shared[other * WARP_STAGES + i / TILE_INPUTS * SUM_PITCH + i % TILE_INPUTS];
      update.apply(weight_of(n), now[n], total);
    }
    if (has_bias) {
      float total = 0.0f;
      for (int other = 0; other < sharing; other++)
        total += shared[other * WARP_STAGES + TILE_UNITS * SUM_PITCH + threadIdx.x];
      update.apply(sizes.units * sizes.inputs + unit, bias, total);
    }
    __syncthreads();
  }
};

}  // namespace tuned
