// Stage tuned: fully connected layer + bias + activation of one image by one block. Needs: INPUTS, UNITS, FUNCTION,
// HELD (the weights are in shared memory; else they are read from device memory), PHASE (floats from a 16-byte boundary
// to the first weight, in both memories), SENDERS (threads that share the units
// of one source error), BLOCK (threads), TRACE_SOURCE and TRACE_DELTA (where the image's trace keeps them).
// weights: (UNITS, INPUTS), then bias (UNITS,).
#include "async.cuh"

constexpr int PARAMETERS = UNITS * INPUTS + UNITS;
constexpr int WARPS = BLOCK / 32;
constexpr int LANE_INPUTS = (INPUTS + 31) / 32;
constexpr bool FEW_INPUTS = LANE_INPUTS <= 16;  // a warp's lanes hold the whole source in registers
constexpr int TOGETHER = 4;                     // units a warp sums at a time, so that loads do not wait for each other

// The weights and the bias on their way into shared memory; wait_for_copies() and a barrier before they are used.
__device__ __forceinline__ void hold(const float* parameters, float* held) {
  constexpr int LEAD = (4 - PHASE) % 4 < PARAMETERS ? (4 - PHASE) % 4 : PARAMETERS;
  constexpr int WHOLE = (PARAMETERS - LEAD) / 4, REST = LEAD + WHOLE * 4;
  for (int i : block_range(WHOLE))
    copy_async(reinterpret_cast<Quad*>(held + LEAD) + i, reinterpret_cast<const Quad*>(parameters + LEAD) + i);
  for (int i : block_range(LEAD)) held[i] = fresh(parameters + i);
  for (int i : block_range(PARAMETERS - REST)) held[REST + i] = fresh(parameters + REST + i);
}

__device__ __forceinline__ float weight_at(const float* weights, int i) { return HELD ? weights[i] : fresh(weights + i); }

// target = f(weights source + bias): a warp a unit, its lanes along the inputs
__device__ __forceinline__ void forward(const float* source, const float* weights, float* target) {
  const int lane = threadIdx.x % 32;
  float value[FEW_INPUTS ? LANE_INPUTS : 1];
  if (FEW_INPUTS)
UNROLL
    for (int n = 0; n < LANE_INPUTS; n++) value[n] = lane + n * 32 < INPUTS ? source[lane + n * 32] : 0.0f;
  for (int first = threadIdx.x / 32 * TOGETHER; first < UNITS; first += WARPS * TOGETHER) {
    float sum[TOGETHER];
UNROLL
    for (int t = 0; t < TOGETHER; t++) {
      sum[t] = 0.0f;
      if (first + t >= UNITS) continue;
      const int row = (first + t) * INPUTS;
      if (FEW_INPUTS) {
UNROLL
        for (int n = 0; n < LANE_INPUTS; n++)
          if (lane + n * 32 < INPUTS) sum[t] = fmaf(weight_at(weights, row + lane + n * 32), value[n], sum[t]);
      } else {
        for (int i = lane; i < INPUTS; i += 32) sum[t] = fmaf(weight_at(weights, row + i), source[i], sum[t]);
      }
    }
UNROLL
    for (int t = 0; t < TOGETHER; t++)
UNROLL
      for (int bit = 16; bit; bit /= 2) sum[t] += __shfl_xor_sync(0xffffffffu, sum[t], bit);
UNROLL
    for (int t = 0; t < TOGETHER; t++)
      if (lane == t && first + t < UNITS)
        target[first + t] = activate<FUNCTION>(sum[t] + weight_at(weights, UNITS * INPUTS + first + t));
  }
}

// errors (UNITS,) *= slope, so that they are the derivative by the sums; the trace keeps them, and the source.
__device__ __forceinline__ void leave_trace(const float* source, const float* target, float* errors, float* trace) {
  for (int i : block_range(INPUTS)) trace[TRACE_SOURCE + i] = source[i];
  for (int u : block_range(UNITS)) {
    const float delta = errors[u] * slope<FUNCTION>(target[u]);
    errors[u] = delta;
    trace[TRACE_DELTA + u] = delta;
  }
}

// source_errors (INPUTS,) = transposed weights x deltas. scratch: SENDERS * INPUTS floats if SENDERS > 1.
__device__ __forceinline__ void send_back(const float* deltas, const float* weights, float* source_errors,
                                          float* scratch) {
  for (int job = threadIdx.x; job < INPUTS * SENDERS; job += BLOCK) {
    const int i = job % INPUTS, sender = job / INPUTS;
    const int from = sender * UNITS / SENDERS, to = (sender + 1) * UNITS / SENDERS;
    float sum = 0.0f;
    for (int u = from; u < to; u++) sum = fmaf(weight_at(weights, u * INPUTS + i), deltas[u], sum);
    (SENDERS == 1 ? source_errors : scratch + sender * INPUTS)[i] = sum;
  }
  if (SENDERS == 1) return;
  __syncthreads();
  for (int i = threadIdx.x; i < INPUTS; i += BLOCK) {
    float total = scratch[i];
UNROLL
    for (int sender = 1; sender < SENDERS; sender++) total += scratch[sender * INPUTS + i];
    source_errors[i] = total;
  }
}

// The update: the gradient is deltas^T x sources over the batch, in tiles of which a block makes one.
constexpr int TILE_UNITS = 16, TILE_INPUTS = 32, AT_ONCE = 64;  // images whose numbers are in shared memory together
constexpr int ACROSS = 4, DOWN = 2;                             // numbers a thread makes: inputs, units
constexpr int TEAM = TILE_UNITS / DOWN * (TILE_INPUTS / ACROSS), TEAMS = BLOCK / TEAM;
constexpr int WIDE = (INPUTS + 1 + TILE_INPUTS - 1) / TILE_INPUTS, HIGH = (UNITS + TILE_UNITS - 1) / TILE_UNITS;
constexpr int TILES = WIDE * HIGH;
constexpr int TILE_SIZE = TILE_UNITS * TILE_INPUTS;

// traces (count, TRACE). The bias is the weight of an input that is always 1. done(parameter of this layer, gradient).
// shared: AT_ONCE * (TILE_UNITS + TILE_INPUTS) + TEAMS * TILE_SIZE floats.
template <int TRACE, class Done>
__device__ __forceinline__ void sum_tile(int tile, const float* traces, int count, float* shared, Done done) {
  const int unit0 = tile / WIDE * TILE_UNITS, input0 = tile % WIDE * TILE_INPUTS;
  float* deltas = shared;
  float* sources = deltas + AT_ONCE * TILE_UNITS;
  float* sums = sources + AT_ONCE * TILE_INPUTS;
  const int team = threadIdx.x / TEAM, member = threadIdx.x % TEAM;
  const int down = member / (TILE_INPUTS / ACROSS) * DOWN, across = member % (TILE_INPUTS / ACROSS) * ACROSS;
  float sum[DOWN][ACROSS];
UNROLL
  for (int y = 0; y < DOWN; y++)
UNROLL
    for (int x = 0; x < ACROSS; x++) sum[y][x] = 0.0f;
  for (int first = 0; first < count; first += AT_ONCE) {
    __syncthreads();
    for (int i : block_range(AT_ONCE * TILE_UNITS)) {
      const int image = first + i / TILE_UNITS, unit = unit0 + i % TILE_UNITS;
      deltas[i] = image < count && unit < UNITS ? fresh(traces + image * TRACE + TRACE_DELTA + unit) : 0.0f;
    }
    for (int i : block_range(AT_ONCE * TILE_INPUTS)) {
      const int image = first + i / TILE_INPUTS, input = input0 + i % TILE_INPUTS;
      sources[i] = image < count && input < INPUTS ? fresh(traces + image * TRACE + TRACE_SOURCE + input)
                                                   : image < count && input == INPUTS ? 1.0f : 0.0f;
    }
    __syncthreads();
    for (int k = team; k < min(AT_ONCE, count - first); k += TEAMS)
UNROLL
      for (int y = 0; y < DOWN; y++)
UNROLL
        for (int x = 0; x < ACROSS; x++)
          sum[y][x] = fmaf(deltas[k * TILE_UNITS + down + y], sources[k * TILE_INPUTS + across + x], sum[y][x]);
  }
UNROLL
  for (int y = 0; y < DOWN; y++)
UNROLL
    for (int x = 0; x < ACROSS; x++) sums[team * TILE_SIZE + (down + y) * TILE_INPUTS + across + x] = sum[y][x];
  __syncthreads();
  for (int i = threadIdx.x; i < TILE_SIZE; i += BLOCK) {
    const int unit = unit0 + i / TILE_INPUTS, input = input0 + i % TILE_INPUTS;
    if (unit >= UNITS || input > INPUTS) continue;
    float total = sums[i];
    for (int other = 1; other < TEAMS; other++) total += sums[other * TILE_SIZE + i];
    done(input < INPUTS ? unit * INPUTS + input : UNITS * INPUTS + unit, total);
  }
  __syncthreads();
}
