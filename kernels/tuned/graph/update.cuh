// Plan `graph` of stage tuned: a step's update, whose loads are all in flight at once, and the images of the next step.
//
// A block has one piece of the work at a time: weights of a layer whose gradient lies in partial sums, weights of a layer of
// head.cuh, whose gradient is made here, or images. What a kernel before the last one wrote is loaded before this kernel waits;
// see wait_for_previous_kernel. What the last one wrote is loaded by load_l2, which no compiler takes for a number that never
// changes and loads earlier.
//
// Needs: THREADS, IMAGE_SIZE, CHANNELS, WEIGHT_DECAY; AHEAD, whether the images of the next step are gathered, and the step is
// counted elsewhere; EARLY, whether at least one kernel lies between the one that counts and this one.
#pragma once
#include "../../arithmetic.cuh"
#include "../../layers.cuh"
#include "../../levels.cuh"

namespace graph {

// A layer's piece of the update. With partial sums: `shares` threads add up those of `units` weights; partial sum g of weight
// i is numbers[start + g size + i]. shares = 0: the gradient of weight (u, k) is the sum over images of
// numbers[errors_at + image units + u] numbers[start + image inputs + k], and of the errors alone for a bias.
struct UpdateSegment {
  int shares, offset, size, groups, start, units, inputs, errors_at;
};

// Where the images of the next step come from and go to: as the arguments of gather_images in counted_batch.cuh.
struct NextImages {
  const unsigned char* bytes;
  const unsigned char* all_labels;
  const int* order;
  float* target;
  unsigned char* labels;
  Levels levels;
  int available;  // elements of `order` that may be read
};

template <class Step>
struct StepUpdate {
  static constexpr int THREADS = Step::THREADS, IMAGE_SIZE = Step::IMAGE_SIZE, CHANNELS = Step::CHANNELS;
  static constexpr int LANES = 32, WARPS = THREADS / LANES;
  static constexpr int EACH = 4;                             // weights of a thread
  static constexpr int TILE_UNITS = 4, TILE_INPUTS = LANES;  // of a block that makes a gradient
  static constexpr int TOGETHER = IMAGE_SIZE % 4 == 0 ? 4 : 1, VECTORS = IMAGE_SIZE / TOGETHER;

  float* parameters;
  float* velocity;
  float* gradient;
  const float* partials;
  const float* traces;
  float* sums;  // shared, THREADS * EACH
  float momentum;
  int apply, count;

  static __device__ __forceinline__ int jobs_of(const UpdateSegment& segment) {
    if (segment.shares == 0) return ceil_div(segment.inputs + 1, TILE_INPUTS) * ceil_div(segment.units, TILE_UNITS);
    return ceil_div(segment.size, THREADS / segment.shares * segment.units);
  }

  // The weights that a thread updates: index in the vector of all parameters, or -1.
  static __device__ __forceinline__ void own_weights(const UpdateSegment& segment, int job, int (&own)[EACH]) {
    const int thread = threadIdx.x;
    UNROLL_FOR(int e = 0; e < EACH; e++) own[e] = -1;
    if (segment.shares == 1) {
      UNROLL_FOR(int e = 0; e < EACH; e++) {
        const int i = (job * EACH + e) * THREADS + thread;
        if (i < segment.size) own[e] = segment.offset + i;
      }
    } else if (segment.shares > 1) {
      const int weights = THREADS / segment.shares * segment.units, i = job * weights + thread;
      if (thread < weights && i < segment.size) own[0] = segment.offset + i;
    } else if (thread < TILE_UNITS * TILE_INPUTS) {
      const int wide = ceil_div(segment.inputs + 1, TILE_INPUTS);
      const int unit = job / wide * TILE_UNITS + thread / LANES, input = job % wide * TILE_INPUTS + thread % LANES;
      if (unit < segment.units && input < segment.inputs) own[0] = segment.offset + unit * segment.inputs + input;
      if (unit < segment.units && input == segment.inputs)
        own[0] = segment.offset + segment.units * segment.inputs + unit;
    }
  }

  // The gradients of these weights.
  __device__ __forceinline__ void find_gradients(const UpdateSegment& segment, int job, float (&found)[EACH]) const {
    const int thread = threadIdx.x;
    if (segment.shares == 1) {
      constexpr int FLIGHT = 4;
      const float* values = partials + segment.start + job * EACH * THREADS + thread;
      const int left = segment.size - job * EACH * THREADS - thread;
      UNROLL_FOR(int e = 0; e < EACH; e++) found[e] = 0.0f;
      for (int group = 0; group < segment.groups; group += FLIGHT) {
        float value[FLIGHT][EACH];
        UNROLL_FOR(int g = 0; g < FLIGHT; g++)
          UNROLL_FOR(int e = 0; e < EACH; e++) {
            const bool there = group + g < segment.groups && e * THREADS < left;
            value[g][e] = there ? load_l2(values + (group + g) * segment.size + e * THREADS) : 0.0f;
          }
        UNROLL_FOR(int g = 0; g < FLIGHT; g++)
          UNROLL_FOR(int e = 0; e < EACH; e++) found[e] += value[g][e];
      }
      return;
    }
    constexpr int FLIGHT = 8;  // loads of a thread before it adds up the first
    __syncthreads();           // the sums of the job before have been read
    if (segment.shares > 1) {
      if (segment.units == 1)
        add_shares<1>(segment, job);
      else
        add_shares<EACH>(segment, job);
      __syncthreads();
      const int weights = THREADS / segment.shares * segment.units;
      found[0] = 0.0f;
      if (thread < weights)
        for (int share = 0; share < segment.shares; share++) found[0] += sums[share * weights + thread];
      return;
    }
    const int wide = ceil_div(segment.inputs + 1, TILE_INPUTS), share = thread / LANES, lane = thread % LANES;
    const int unit = job / wide * TILE_UNITS, input = job % wide * TILE_INPUTS + lane;
    const float* values = traces + segment.start + input;
    const float* errors = traces + segment.errors_at + unit;
    float sum[TILE_UNITS] = {};
    for (int image = share; image < count; image += WARPS * FLIGHT) {
      float value[FLIGHT], error[FLIGHT][TILE_UNITS];
      UNROLL_FOR(int n = 0; n < FLIGHT; n++) {
        const int at = image + n * WARPS;
        value[n] = input < segment.inputs && at < count ? load_l2(values + at * segment.inputs) : 1.0f;
        UNROLL_FOR(int u = 0; u < TILE_UNITS; u++)
          error[n][u] = at < count && unit + u < segment.units ? load_l2(errors + at * segment.units + u) : 0.0f;
      }
      UNROLL_FOR(int n = 0; n < FLIGHT; n++)
        UNROLL_FOR(int u = 0; u < TILE_UNITS; u++) sum[u] = fmaf(error[n][u], value[n], sum[u]);
    }
    UNROLL_FOR(int u = 0; u < TILE_UNITS; u++) sums[(share * TILE_UNITS + u) * LANES + lane] = sum[u];
    __syncthreads();
    found[0] = 0.0f;
    if (thread < TILE_UNITS * LANES)
      UNROLL_FOR(int other = 0; other < WARPS; other++) found[0] += sums[other * TILE_UNITS * LANES + thread];
  }

  // sums (shares, THREADS / shares * WEIGHTS): of every shares-th partial sum of some weights.
  template <int WEIGHTS>
  __device__ __forceinline__ void add_shares(const UpdateSegment& segment, int job) const {
    constexpr int FLIGHT = 16 / WEIGHTS;
    const int apart = THREADS / segment.shares, lane = threadIdx.x % apart, share = threadIdx.x / apart;
    const int i = job * apart * WEIGHTS + lane;
    float sum[WEIGHTS] = {};
    for (int group = share; group < segment.groups; group += FLIGHT * segment.shares) {
      float value[FLIGHT][WEIGHTS];
      UNROLL_FOR(int g = 0; g < FLIGHT; g++)
        UNROLL_FOR(int w = 0; w < WEIGHTS; w++) {
          const int at = group + g * segment.shares, weight = i + w * apart;
          const bool there = at < segment.groups && weight < segment.size;
          value[g][w] = there ? load_l2(partials + segment.start + at * segment.size + weight) : 0.0f;
        }
      UNROLL_FOR(int g = 0; g < FLIGHT; g++)
        UNROLL_FOR(int w = 0; w < WEIGHTS; w++) sum[w] += value[g][w];
    }
    UNROLL_FOR(int w = 0; w < WEIGHTS; w++) sums[(share * WEIGHTS + w) * apart + lane] = sum[w];
  }

  // rates: with AHEAD those of all steps of a load, of which *position have begun; else the rate of this step alone.
  __device__ __forceinline__ void run(const UpdateSegment* __restrict__ segments, int segment_count,
                                      const float* __restrict__ rates, int* __restrict__ moment,
                                      int* __restrict__ position, int counts, const NextImages& next) const {
    bool waited = false;
    const auto wait = [&] {
      if (waited) return;
      wait_for_previous_kernel();
      let_next_kernel_start();
      waited = true;
    };
    const bool gathers = Step::AHEAD && apply && counts;
    if (Step::AHEAD && !Step::EARLY) wait();
    for (int job = blockIdx.x;; job += gridDim.x) {
      int own_job = job, s = 0;
      UpdateSegment segment = {};
      for (; s < segment_count; s++) {
        segment = segments[s];
        const int jobs = jobs_of(segment);
        if (own_job < jobs) break;
        own_job -= jobs;
      }
      if (s == segment_count) {
        const int i = own_job * THREADS + static_cast<int>(threadIdx.x);
        if (!gathers || own_job * THREADS >= count * VECTORS) break;
        gather(i, position, next, wait);
        continue;
      }
      int own[EACH];
      float weight[EACH], speed[EACH], found[EACH];
      own_weights(segment, own_job, own);
      if (apply)
        UNROLL_FOR(int e = 0; e < EACH; e++)
          if (own[e] >= 0) weight[e] = parameters[own[e]], speed[e] = velocity[own[e]];
      float rate = 0.0f;
      if (Step::AHEAD && counts && apply) rate = rates[min(max(*position - 1, 0), next.available / count - 1)];
      wait();
      if (!(Step::AHEAD && counts) && apply) rate = *rates;
      find_gradients(segment, own_job, found);
      UNROLL_FOR(int e = 0; e < EACH; e++) {
        if (own[e] < 0) continue;
        if (apply) {
          descend(weight[e], speed[e], found[e], rate, momentum, Step::WEIGHT_DECAY);
          parameters[own[e]] = weight[e], velocity[own[e]] = speed[e];
        } else {
          gradient[own[e]] = found[e];
        }
      }
    }
    wait();
    if (apply && counts && blockIdx.x == 0 && threadIdx.x == 0) {
      moment[0] = static_cast<int>(static_cast<unsigned>(moment[0]) + 1u);
      if (!Step::AHEAD) *position += 1;
    }
  }

  // Pixels of one vector of the next step's images, and a label.
  template <class Wait>
  __device__ __forceinline__ void gather(int i, const int* __restrict__ position, const NextImages& next,
                                         Wait wait) const {
    const int image = min(i / VECTORS, count - 1), pixel = i % VECTORS * TOGETHER, first = *position * count;
    const auto element = [&](int n) { return next.order[min(first + n, next.available - 1)]; };
    const unsigned char* source = next.bytes + element(image) * IMAGE_SIZE + pixel;
    unsigned char byte[TOGETHER];
    if constexpr (TOGETHER == 4) {
      const uchar4 four = *reinterpret_cast<const uchar4*>(source);
      byte[0] = four.x, byte[1] = four.y, byte[2] = four.z, byte[3] = four.w;
    } else {
      byte[0] = *source;
    }
    const unsigned char label = i < count ? next.all_labels[element(i)] : 0;
    wait();
    if (i < count) next.labels[i] = label;
    if (i >= count * VECTORS) return;
    float number[TOGETHER];
    UNROLL_FOR(int p = 0; p < TOGETHER; p++) {
      const int channel = (pixel + p) / (IMAGE_SIZE / CHANNELS);
      number[p] = (float(byte[p]) - next.levels.template mean_of<CHANNELS>(channel)) /
                  next.levels.template deviation_of<CHANNELS>(channel);
    }
    float* to = next.target + image * IMAGE_SIZE + pixel;
    if constexpr (TOGETHER == 4)
      *reinterpret_cast<Float4*>(to) = {{number[0], number[1], number[2], number[3]}};
    else
      *to = number[0];
  }
};

}  // namespace graph

#define TUNED_GRAPH_UPDATE_KERNELS(step)                                                                               \
  ENTRY_POINT_RESIDENT(step, update, step::THREADS, 3)                                                                 \
  (float* __restrict__ parameters, float* __restrict__ velocity, float* __restrict__ gradient,                         \
   const float* __restrict__ partials, const float* __restrict__ traces, const int* __restrict__ segments,             \
   int segment_count, const float* __restrict__ rates, float momentum, int apply, int* __restrict__ moment,            \
   int* __restrict__ position, int counts, const unsigned char* __restrict__ bytes,                                    \
   const unsigned char* __restrict__ all_labels, const int* __restrict__ order, float* __restrict__ target,            \
   unsigned char* __restrict__ labels, float mean, float deviation, const float* __restrict__ channels, int available, \
   int count) {                                                                                                        \
    SHARED(float, sums, step::THREADS * 4);                                                                            \
    const graph::StepUpdate<step> own = {parameters, velocity, gradient, partials, traces,                             \
                                         sums,       momentum, apply,    count};                                       \
    own.run(reinterpret_cast<const graph::UpdateSegment*>(segments), segment_count, rates, moment, position, counts,   \
            {bytes, all_labels, order, target, labels, {mean, deviation, channels}, available});                       \
  }
