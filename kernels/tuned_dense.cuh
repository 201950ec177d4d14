// Stage tuned: fully connected layer + bias + activation of IMAGES images by one block, as products of matrices. Needs:
// INPUTS, UNITS, FUNCTION, IMAGES, HELD (the weights are in shared memory; else they are read from device memory),
// PITCH (floats from a unit's weights to the next one's in shared memory; even), ALIGNED (rows of weights begin at
// 16-byte boundaries in both memories), SOURCE_PITCH and TARGET_PITCH (floats from an image's numbers to the next one's;
// even), BLOCK (threads), TRACE_SOURCE and TRACE_DELTA (where the image's trace keeps them), STAGES (pieces of traces that
// a warp has on their way in the update; even).
// weights: (UNITS, INPUTS), then bias (UNITS,). Source and errors: (IMAGES, INPUTS), target and deltas: (IMAGES, UNITS).
#include "async.cuh"
#include "tensor.cuh"

constexpr int WARPS = BLOCK / 32;
constexpr int ROW = HELD ? PITCH : INPUTS;
constexpr int ACROSS = (IMAGES + 7) / 8;                                      // tiles of images
// Sums that a warp makes side by side; where weights come from far away, more loads must be on their way.
constexpr int EACH = (HELD ? 4 : 8) / ACROSS < 1 ? 1 : (HELD ? 4 : 8) / ACROSS;
constexpr int UNIT_TILES = (UNITS + 15) / 16, INPUT_TILES = (INPUTS + 15) / 16;
constexpr int UNIT_EIGHTS = (UNITS + 7) / 8, INPUT_EIGHTS = (INPUTS + 7) / 8;

// How many warps share a sum of `terms` pieces, where there are `tiles` of them.
__host__ __device__ constexpr int warps_for(int tiles, int terms) {
  return tiles >= WARPS ? 1 : WARPS / tiles < terms ? WARPS / tiles : terms;
}
constexpr int SHARES = warps_for(UNIT_TILES, INPUT_EIGHTS), SENDERS = warps_for(INPUT_TILES, UNIT_EIGHTS);

// The weights as they lie, in one copy by the hardware's engine: this many bytes, or 0 where it cannot be.
constexpr int WHOLE_BYTES = ALIGNED && PITCH == INPUTS ? UNITS * INPUTS * 4 : 0;

// By one thread, after fence_async_proxy and expect_bytes.
__device__ __forceinline__ void hold_whole(const float* parameters, float* held, BulkCopyBarrier& arrivals) {
  if (WHOLE_BYTES) copy_bulk(held, parameters, UNITS * INPUTS, arrivals);
}

// By all threads: what is left of weights and bias on its way into shared memory.
__device__ __forceinline__ void hold(const float* parameters, float* held) {
  constexpr int ROW_QUADS = INPUTS < 4 ? 1 : INPUTS / 4;
  if (ALIGNED && !WHOLE_BYTES) {
#pragma unroll 4
    for (int i = threadIdx.x; i < UNITS * ROW_QUADS; i += BLOCK)
      copy_async(reinterpret_cast<Float4*>(held + i / ROW_QUADS * PITCH) + i % ROW_QUADS,
                 reinterpret_cast<const Float4*>(parameters) + i);
  } else if (!WHOLE_BYTES) {
    for (int i = threadIdx.x; i < UNITS * INPUTS; i += BLOCK)
      copy_async(held + i / INPUTS * PITCH + i % INPUTS, parameters + i);
  }
  for (int i = threadIdx.x; i < UNITS; i += BLOCK) copy_async(held + UNITS * PITCH + i, parameters + UNITS * INPUTS + i);
  // what lies between a row's inputs and its last eight is multiplied too
  constexpr int REST = (INPUT_EIGHTS * 8 < PITCH ? INPUT_EIGHTS * 8 : PITCH) - INPUTS;
  for (int i : block_range(UNITS * REST)) held[i / max(1, REST) * PITCH + INPUTS + i % max(1, REST)] = 0.0f;
}

// What lies beyond the inputs is multiplied too; a barrier before forward.
__device__ __forceinline__ void pad(float* source) {
  constexpr int REST = INPUT_EIGHTS * 8 - INPUTS;
  for (int i : block_range(IMAGES * REST))
    source[i / max(1, REST) * SOURCE_PITCH + INPUTS + i % max(1, REST)] = 0.0f;
}

__device__ __forceinline__ float weight_at(const float* weights, int i) { return HELD ? weights[i] : load_l2(weights + i); }

// Pair neighbouring weights of a unit.
__device__ __forceinline__ Pair weights_at(const float* weights, int unit, int input) {
  const int at = min(unit, UNITS - 1) * ROW + input;
  if (HELD) return *reinterpret_cast<const Pair*>(weights + at);
  return {input < INPUTS ? load_l2(weights + at) : 0.0f, input + 1 < INPUTS ? load_l2(weights + at + 1) : 0.0f};
}

// sum[0] += the others: sums that did not have to wait for each other.
__device__ __forceinline__ void add_up(Fragment (&sum)[EACH][ACROSS]) {
UNROLL
  for (int m = 1; m < EACH; m++)
UNROLL
    for (int n = 0; n < ACROSS; n++)
UNROLL
      for (int i = 0; i < 4; i++) sum[0][n].at[i] += sum[m][n].at[i];
}

// One image alone has nothing for a product of matrices: four inputs at a time, weights straight into the sums.
constexpr bool ALONE = IMAGES == 1 && HELD && INPUTS % 4 == 0 && PITCH % 4 == 0 && INPUTS <= 1024;
constexpr int QUADS = INPUTS / 4, LANE_QUADS = (QUADS + 31) / 32;
constexpr int QUAD_SENDERS = QUADS < 1 || QUADS > BLOCK ? 1 : BLOCK / QUADS < UNITS ? BLOCK / QUADS : UNITS;

// A warp makes four units at a time, its lanes along the inputs.
__device__ __forceinline__ void forward_alone(const float* source, const float* weights, float* target) {
  constexpr unsigned ALL = 0xffffffffu;
  const int lane = threadIdx.x % 32;
  const auto quad = [](const float* from, int i) {
    return i < QUADS ? reinterpret_cast<const Float4*>(from)[i] : Float4{{0.0f, 0.0f, 0.0f, 0.0f}};
  };
  Float4 value[LANE_QUADS];
UNROLL
  for (int n = 0; n < LANE_QUADS; n++) value[n] = quad(source, lane + n * 32);
#pragma unroll 2
  for (int first = threadIdx.x / 32 * 4; first < UNITS; first += WARPS * 4) {
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
UNROLL
    for (int u = 0; u < 4; u++)
UNROLL
      for (int n = 0; n < LANE_QUADS; n++) {
        const Float4 weight = quad(weights + min(first + u, UNITS - 1) * PITCH, lane + n * 32);
UNROLL
        for (int i = 0; i < 4; i++) sum[u] = fmaf(weight.at[i], value[n].at[i], sum[u]);
      }
    // each exchange halves what a lane has still to add up: first half the units, then a unit, then lanes
    const bool upper = lane & 16, odd = lane & 8;
    float mine[2];
UNROLL
    for (int u = 0; u < 2; u++)
      mine[u] = (upper ? sum[u + 2] : sum[u]) + __shfl_xor_sync(ALL, upper ? sum[u] : sum[u + 2], 16);
    float total = (odd ? mine[1] : mine[0]) + __shfl_xor_sync(ALL, odd ? mine[0] : mine[1], 8);
UNROLL
    for (int bit = 4; bit; bit /= 2) total += __shfl_xor_sync(ALL, total, bit);
    const int unit = first + lane / 8;
    if (lane % 8 == 0 && unit < UNITS) target[unit] = activate<FUNCTION>(total + weights[UNITS * PITCH + unit]);
  }
}

// A thread makes four inputs' errors, from a share of the units. scratch: QUAD_SENDERS * INPUTS floats.
__device__ __forceinline__ void send_back_alone(const float* deltas, const float* weights, float* source_errors,
                                                float* scratch) {
  for (int job = threadIdx.x; job < QUADS * QUAD_SENDERS; job += BLOCK) {
    const int i = job % QUADS, sender = job / QUADS;
    const int from = sender * UNITS / QUAD_SENDERS, to = (sender + 1) * UNITS / QUAD_SENDERS;
    Float4 sum = {{0.0f, 0.0f, 0.0f, 0.0f}};
#pragma unroll 4
    for (int u = from; u < to; u++) {
      const Float4 weight = reinterpret_cast<const Float4*>(weights + u * PITCH)[i];
      const float delta = deltas[u];
UNROLL
      for (int k = 0; k < 4; k++) sum.at[k] = fmaf(weight.at[k], delta, sum.at[k]);
    }
    reinterpret_cast<Float4*>(scratch + sender * INPUTS)[i] = sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < INPUTS; i += BLOCK) {
    float total = scratch[i];
UNROLL
    for (int sender = 1; sender < QUAD_SENDERS; sender++) total += scratch[sender * INPUTS + i];
    source_errors[i] = total;
  }
}

// Weights that are far away come four neighbours at once, which are two pairs of a lane, while others are multiplied.
constexpr bool FAR_QUADS = !HELD && ALIGNED && EACH > 1;
constexpr int INPUT_SIXTEENTHS = (INPUTS + 15) / 16;

// sum += a share of the products of 16 units, from unit0 on, and all images.
__device__ __forceinline__ void multiply_far(const float* source, const float* weights, int unit0, int share,
                                             Fragment (&sum)[EACH][ACROSS]) {
  constexpr int FOURS = EACH > 1 ? EACH / 2 : 1;
  Float4 coming[FOURS][2];
  const auto fetch = [&](int first) {
UNROLL
    for (int m = 0; m < FOURS; m++)
UNROLL
      for (int lower = 0; lower < 2; lower++) {
        const int lane = threadIdx.x % 32, unit = min(unit0 + lane / 4 + lower * 8, UNITS - 1);
        const int input = (first + m * SHARES) * 16 + lane % 4 * 4;
        coming[m][lower] = input < INPUTS ? load_l2(reinterpret_cast<const Float4*>(weights + unit * INPUTS + input))
                                          : Float4{{0.0f, 0.0f, 0.0f, 0.0f}};
      }
  };
  fetch(share);
#pragma unroll 2
  for (int first = share; first < INPUT_SIXTEENTHS; first += SHARES * FOURS) {
    Float4 here[FOURS][2];
UNROLL
    for (int m = 0; m < FOURS; m++) here[m][0] = coming[m][0], here[m][1] = coming[m][1];
    fetch(first + SHARES * FOURS);
    mma_3xtf32<true>(
        sum,
        [&](int m, int row, int pair) -> Pair {
#ifdef __CUDA_ARCH__
          const Float4& quad = here[m / 2][row < 8 ? 0 : 1];  // the lane's own
          return {quad.at[m % 2 * 2], quad.at[m % 2 * 2 + 1]};
#else
          const int unit = min(unit0 + row, UNITS - 1), input = (first + m / 2 * SHARES) * 16 + pair * 4 + m % 2 * 2;
          const float* weight = weights + unit * INPUTS + input;
          return input < INPUTS ? Pair{weight[0], weight[1]} : Pair{0.0f, 0.0f};
#endif
        },
        [&](int m, int n, int pair, int image) -> Pair {
          const int input = min((first + m / 2 * SHARES) * 16 + pair * 4 + m % 2 * 2, INPUT_EIGHTS * 8 - 2);
          return *reinterpret_cast<const Pair*>(source + min(n * 8 + image, IMAGES - 1) * SOURCE_PITCH + input);
        });
  }
}

// target = f(weights source + bias). scratch: SHARES * UNIT_TILES * 16 * ACROSS * 8 floats.
__device__ __forceinline__ void forward(const float* source, const float* weights, float* target, float* scratch) {
  if (ALONE) return forward_alone(source, weights, target);
  constexpr int WIDE = ACROSS * 8, HIGH = UNIT_TILES * 16;
  for (int task = threadIdx.x / 32; task < UNIT_TILES * SHARES; task += WARPS) {
    const int share = task / UNIT_TILES, unit0 = task % UNIT_TILES * 16;
    Fragment sum[EACH][ACROSS];
    clear(sum);
    if (FAR_QUADS) multiply_far(source, weights, unit0, share, sum);
    for (int eight = share; !FAR_QUADS && eight < INPUT_EIGHTS; eight += SHARES * EACH)
      mma_3xtf32<true>(
          sum,
          [&](int m, int row, int pair) -> Pair {
            const int at = eight + m * SHARES;
            return at < INPUT_EIGHTS ? weights_at(weights, unit0 + row, at * 8 + pair * 2) : Pair{0.0f, 0.0f};
          },
          [&](int m, int n, int pair, int image) -> Pair {
            const int at = min(eight + m * SHARES, INPUT_EIGHTS - 1);
            return *reinterpret_cast<const Pair*>(source + min(n * 8 + image, IMAGES - 1) * SOURCE_PITCH + at * 8 + pair * 2);
          });
    add_up(sum);
UNROLL
    for (int n = 0; n < ACROSS; n++)
UNROLL
      for (int i = 0; i < 4; i++)
        scratch[(share * HIGH + unit0 + tile_row(i)) * WIDE + n * 8 + tile_column(i)] = sum[0][n].at[i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < UNITS * IMAGES; i += BLOCK) {
    const int unit = i / IMAGES, image = i % IMAGES;
    float total = weight_at(weights, UNITS * ROW + unit);
UNROLL
    for (int share = 0; share < SHARES; share++) total += scratch[(share * HIGH + unit) * WIDE + image];
    target[image * TARGET_PITCH + unit] = activate<FUNCTION>(total);
  }
}

// errors (IMAGES, UNITS) *= slope, so that they are the derivative by the sums; the traces of the first `here` images,
// `stride` floats apart, keep them, and the sources.
__device__ __forceinline__ void leave_trace(const float* source, const float* target, float* errors, float* trace,
                                            int stride, int here) {
#pragma unroll 1
  for (int i = threadIdx.x; i < here * INPUTS; i += BLOCK)
    trace[i / INPUTS * stride + TRACE_SOURCE + i % INPUTS] = source[i / INPUTS * SOURCE_PITCH + i % INPUTS];
#pragma unroll 1
  for (int i = threadIdx.x; i < IMAGES * UNIT_EIGHTS * 8; i += BLOCK) {
    const int image = i / (UNIT_EIGHTS * 8), unit = i % (UNIT_EIGHTS * 8), at = image * TARGET_PITCH + unit;
    const float delta = unit < UNITS && image < here ? errors[at] * slope<FUNCTION>(target[at]) : 0.0f;
    errors[at] = delta;
    if (unit < UNITS && image < here) trace[image * stride + TRACE_DELTA + unit] = delta;
  }
}

// source_errors = transposed weights x deltas. scratch: SENDERS * INPUT_TILES * 16 * ACROSS * 8 floats if SENDERS > 1
// or, if ALONE, those of send_back_alone.
__device__ __forceinline__ void send_back(const float* deltas, const float* weights, float* source_errors,
                                          float* scratch) {
  if (ALONE) return send_back_alone(deltas, weights, source_errors, scratch);
  constexpr int WIDE = ACROSS * 8, HIGH = INPUT_TILES * 16;
  for (int task = threadIdx.x / 32; task < INPUT_TILES * SENDERS; task += WARPS) {
    const int sender = task / INPUT_TILES, input0 = task % INPUT_TILES * 16;
    Fragment sum[EACH][ACROSS];
    clear(sum);
    for (int eight = sender; eight < UNIT_EIGHTS; eight += SENDERS * EACH)
      // units pair and pair + 4: neighbours would meet in one bank
      mma_3xtf32<true>(
          sum,
          [&](int m, int row, int pair) -> Pair {
            const int unit = (eight + m * SENDERS) * 8 + pair, input = min(input0 + row, INPUTS - 1);
            return {unit < UNITS ? weight_at(weights, unit * ROW + input) : 0.0f,
                    unit + 4 < UNITS ? weight_at(weights, (unit + 4) * ROW + input) : 0.0f};
          },
          [&](int m, int n, int pair, int image) -> Pair {
            const int at = min(eight + m * SENDERS, UNIT_EIGHTS - 1);
            const float* delta = deltas + min(n * 8 + image, IMAGES - 1) * TARGET_PITCH + at * 8 + pair;
            return {delta[0], delta[4]};
          });
    add_up(sum);
UNROLL
    for (int n = 0; n < ACROSS; n++)
UNROLL
      for (int i = 0; i < 4; i++) {
        const int input = input0 + tile_row(i), image = n * 8 + tile_column(i);
        if (SENDERS > 1)
          scratch[(sender * HIGH + input) * WIDE + image] = sum[0][n].at[i];
        else if (input < INPUTS && image < IMAGES)
          source_errors[image * SOURCE_PITCH + input] = sum[0][n].at[i];
      }
  }
  if (SENDERS == 1) return;
  __syncthreads();
  for (int i = threadIdx.x; i < INPUTS * IMAGES; i += BLOCK) {
    const int input = i / IMAGES, image = i % IMAGES;
    float total = scratch[input * WIDE + image];
UNROLL
    for (int sender = 1; sender < SENDERS; sender++) total += scratch[(sender * HIGH + input) * WIDE + image];
    source_errors[image * SOURCE_PITCH + input] = total;
  }
}

// The update: the gradient is deltas^T x sources over the batch, in tiles of 16 units x 32 inputs of which a block makes
// one. Its warps share the images, eight at a time, of which each warp has STAGES on their way into shared memory: rows
// of 16 deltas and 32 sources, an odd number of quads of banks apart.
constexpr int TILE_UNITS = 16, TILE_INPUTS = 32, TILE_PITCH = TILE_INPUTS + 8;
constexpr int STAGE_PITCH = TILE_UNITS + TILE_INPUTS + 8, STAGE = 8 * STAGE_PITCH, WARP_STAGES = STAGES * STAGE;
constexpr int TILES_WIDE = (INPUTS + TILE_INPUTS - 1) / TILE_INPUTS;
static_assert(STAGES % 2 == 0, "two are multiplied at a time");
static_assert(WARP_STAGES >= TILE_UNITS * (TILE_PITCH + 1), "a warp's sums lie where its stages were");

// A lane's part of what a tile takes of eight images' traces.
template <int TRACE>
struct Fetch {
  static constexpr int ROW_QUADS = (TILE_UNITS + TILE_INPUTS) / 4, DELTA_QUADS = TILE_UNITS / 4;
  static constexpr int OWN = 8 * ROW_QUADS / 32;
  const float* from[OWN];  // of the first eight
  int image[OWN], place[OWN];
  bool there[OWN];

  __device__ __forceinline__ Fetch(const float* traces, int unit0, int input0) {
UNROLL
    for (int n = 0; n < OWN; n++) {
      const int i = threadIdx.x % 32 + n * 32, quad = i % ROW_QUADS;
      const int unit = unit0 + quad * 4, input = input0 + (quad - DELTA_QUADS) * 4;
      image[n] = i / ROW_QUADS;
      place[n] = image[n] * STAGE_PITCH + quad * 4;
      there[n] = quad < DELTA_QUADS ? unit < UNIT_EIGHTS * 8 : input < INPUT_EIGHTS * 8;
      from[n] = traces + image[n] * TRACE + (quad < DELTA_QUADS ? TRACE_DELTA + unit : TRACE_SOURCE + input);
    }
  }

  // By all lanes of a warp; zeros for images from `count` on.
  __device__ __forceinline__ void operator()(int eight, int count, float* stage) const {
UNROLL
    for (int n = 0; n < OWN; n++)
      copy_async_or_zero(reinterpret_cast<Float4*>(stage + place[n]),
                         reinterpret_cast<const Float4*>(from[n] + static_cast<long long>(eight) * 8 * TRACE),
                         there[n] && eight * 8 + image[n] < count);
  }
};

// traces (count, TRACE). weights.fetch(i) is what there is of this layer's parameter i, weights.change(i, that, gradient)
// changes it. shared: WARPS * WARP_STAGES floats.
template <int TRACE, class Weights>
__device__ __forceinline__ void sum_tile(int tile, const float* traces, int count, float* shared, Weights weights) {
  constexpr int OWN = (TILE_UNITS * TILE_INPUTS + BLOCK - 1) / BLOCK;  // weights of a thread
  const int unit0 = tile / TILES_WIDE * TILE_UNITS, input0 = tile % TILES_WIDE * TILE_INPUTS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int unit = unit0 + static_cast<int>(threadIdx.x);  // whose bias the thread has, if any
  const bool has_bias = input0 == 0 && threadIdx.x < TILE_UNITS && unit < UNITS;
  float* own = shared + warp * WARP_STAGES;
  const int eights = (count + 7) / 8, sharing = min(WARPS, eights);
  const Fetch<TRACE> fetch(traces, unit0, input0);
  if (warp < sharing)
#pragma unroll 1
    for (int stage = 0; stage < STAGES; stage++) {
      // the second of two is multiplied whether there is any or not
      if (warp + stage / 2 * 2 * WARPS < eights) fetch(warp + stage * WARPS, count, own + stage * STAGE);
      end_group_of_copies();
    }

  decltype(weights.fetch(0)) now[OWN], bias;
  const auto place = [&](int n) {  // of the n-th weight of the thread; -1: there is none
    const int i = threadIdx.x + n * BLOCK;
    const int u = unit0 + i / TILE_INPUTS, input = input0 + i % TILE_INPUTS;
    return i < TILE_UNITS * TILE_INPUTS && u < UNITS && input < INPUTS ? u * INPUTS + input : -1;
  };
UNROLL
  for (int n = 0; n < OWN; n++)
    if (place(n) >= 0) now[n] = weights.fetch(place(n));
  if (has_bias) bias = weights.fetch(UNITS * INPUTS + unit);

  if (warp < sharing) {
    Fragment sum[1][4];
    clear(sum);
    float delta_sum[2] = {0.0f, 0.0f};
    for (int eight = warp, stage = 0; eight < eights; eight += 2 * WARPS, stage = (stage + 2) % STAGES) {
      wait_for_groups<STAGES - 2>();
      __syncwarp();
UNROLL
      for (int half = 0; half < 2; half++) {
        const float* rows = own + (stage + half) * STAGE;
        const auto both = [&](int pair, int at) -> Pair {
          return {rows[pair * STAGE_PITCH + at], rows[(pair + 4) * STAGE_PITCH + at]};
        };
        if (input0 == 0) {  // the bias is the weight of an input that is always 1
UNROLL
          for (int upper = 0; upper < 2; upper++) {
            const Pair two = both(lane % 4, lane / 4 + upper * 8);
            delta_sum[upper] += two.x + two.y;
          }
        }
        mma_3xtf32<false>(
            sum, [&](int, int row, int pair) { return both(pair, row); },
            [&](int, int n, int pair, int column) { return both(pair, TILE_UNITS + n * 8 + column); });
      }
      __syncwarp();
UNROLL
      for (int half = 0; half < 2; half++) {
        if (eight + STAGES * WARPS < eights)
          fetch(eight + (STAGES + half) * WARPS, count, own + (stage + half) * STAGE);
        end_group_of_copies();
      }
    }
    // over the warp's stages: sums (16, TILE_PITCH), then of the deltas (16,)
UNROLL
    for (int n = 0; n < 4; n++)
UNROLL
      for (int i = 0; i < 4; i++) own[tile_row(i) * TILE_PITCH + n * 8 + tile_column(i)] = sum[0][n].at[i];
UNROLL
    for (int upper = 0; upper < 2; upper++) {
UNROLL
      for (int bit = 1; bit < 4; bit *= 2) delta_sum[upper] += __shfl_xor_sync(0xffffffffu, delta_sum[upper], bit);
      if (lane % 4 == 0) own[TILE_UNITS * TILE_PITCH + lane / 4 + upper * 8] = delta_sum[upper];
    }
  }
  __syncthreads();
UNROLL
  for (int n = 0; n < OWN; n++) {
    if (place(n) < 0) continue;
    const int i = threadIdx.x + n * BLOCK;
    float total = 0.0f;
    for (int other = 0; other < sharing; other++)
      total += shared[other * WARP_STAGES + i / TILE_INPUTS * TILE_PITCH + i % TILE_INPUTS];
    weights.change(place(n), now[n], total);
  }
  if (has_bias) {
    float total = 0.0f;
    for (int other = 0; other < sharing; other++)
      total += shared[other * WARP_STAGES + TILE_UNITS * TILE_PITCH + threadIdx.x];
    weights.change(UNITS * INPUTS + unit, bias, total);
  }
  __syncthreads();
}
