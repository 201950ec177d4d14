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

#ifndef FOURFOLD_FOR
#ifdef __CUDACC__
#define FOURFOLD_FOR _Pragma("unroll 4") for
#else
#define FOURFOLD_FOR for
#endif
#endif

namespace graph {

// A layer's piece of the update. With partial sums: `shares` threads add up those of `units` weights; partial sum g of weight
// i is numbers[start + g size + i]. shares = 0: the gradient of weight (u, k) is the sum over images of
// numbers[errors_at + image units + u] numbers[start + image inputs + k], and of the errors alone for a bias.
struct UpdateSegment {
  int shares, offset, size, groups, start, units, inputs, errors_at;
  int jobs;   // pieces that blocks have at once
  int apart;  // THREADS / shares; pieces beside each other, where shares = 0
  int unused[2];
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

  // The weight of a segment that a thread updates where its gradient is summed by several threads, or -1.
  static __device__ __forceinline__ int own_weight(const UpdateSegment& segment, int job) {
    const int thread = threadIdx.x;
    if (segment.shares > 1) {
      const int weights = segment.apart * segment.units, i = job * weights + thread;
      return thread < weights && i < segment.size ? i : -1;
    }
    if (thread >= TILE_UNITS * TILE_INPUTS) return -1;
    const int wide = segment.apart;
    const int unit = job / wide * TILE_UNITS + thread / LANES, input = job % wide * TILE_INPUTS + thread % LANES;
    if (unit >= segment.units || input > segment.inputs) return -1;
    return input < segment.inputs ? unit * segment.inputs + input : segment.units * segment.inputs + unit;
  }

  // The gradient of this weight.
  __device__ __forceinline__ float find_gradient(const UpdateSegment& segment, int job) const {
    const int thread = threadIdx.x;
    __syncthreads();  // the sums of the job before have been read
    int weights = TILE_UNITS * LANES, shares = WARPS;
    if (segment.shares == 0) {
      add_images(segment, job);
    } else {
      if (segment.units == 1)
        add_shares<1>(segment, job);
      else
        add_shares<EACH>(segment, job);
      weights = segment.apart * segment.units, shares = segment.shares;
    }
    __syncthreads();
    float found = 0.0f;
    if (thread < weights) FOURFOLD_FOR(int share = 0; share < shares; share++) found += sums[share * weights + thread];
    return found;
  }

  // sums (WARPS, TILE_UNITS, TILE_INPUTS): of every WARPS-th image of a batch. Where there is no unit or input or image, some
  // number is loaded, and nothing becomes of it.
  __device__ __forceinline__ void add_images(const UpdateSegment& segment, int job) const {
    constexpr int FLIGHT = 4;  // images of a thread before it adds up the first
    const int share = threadIdx.x / LANES, lane = threadIdx.x % LANES, units = segment.units, inputs = segment.inputs;
    const int unit = job / segment.apart * TILE_UNITS, input = job % segment.apart * TILE_INPUTS + lane;
    const float* values = traces + segment.start + min(input, inputs - 1);
    const float* errors = traces + segment.errors_at + unit;
    float sum[TILE_UNITS] = {};
    ROLLED_FOR(int image = share; image < count; image += WARPS * FLIGHT) {
      float value[FLIGHT], error[FLIGHT][TILE_UNITS];
      UNROLL_FOR(int n = 0; n < FLIGHT; n++) {
        const int at = min(image + n * WARPS, count - 1);
        value[n] = load_l2(values + at * inputs);
        UNROLL_FOR(int u = 0; u < TILE_UNITS; u++) error[n][u] = load_l2(errors + at * units + u);
      }
      UNROLL_FOR(int n = 0; n < FLIGHT; n++) {
        const float own = image + n * WARPS >= count ? 0.0f : input < inputs ? value[n] : 1.0f;
        UNROLL_FOR(int u = 0; u < TILE_UNITS; u++) sum[u] = fmaf(error[n][u], own, sum[u]);
      }
    }
    UNROLL_FOR(int u = 0; u < TILE_UNITS; u++) sums[(share * TILE_UNITS + u) * LANES + lane] = sum[u];
  }

  // sums (shares, apart * WEIGHTS): of every shares-th partial sum of some weights.
  template <int WEIGHTS>
  __device__ __forceinline__ void add_shares(const UpdateSegment& segment, int job) const {
    constexpr int FLIGHT = 16 / WEIGHTS;
    const int apart = segment.apart, lane = threadIdx.x % apart, share = threadIdx.x / apart;
    const int i = job * apart * WEIGHTS + lane, step = segment.size * segment.shares;
    const float* values = partials + segment.start + share * segment.size;
    float sum[WEIGHTS] = {};
    ROLLED_FOR(int group = share; group < segment.groups; group += FLIGHT * segment.shares, values += FLIGHT * step) {
      float value[FLIGHT][WEIGHTS] = {};
      UNROLL_FOR(int g = 0; g < FLIGHT; g++)
        UNROLL_FOR(int w = 0; w < WEIGHTS; w++)
          if (group + g * segment.shares < segment.groups)
            value[g][w] = load_l2(values + g * step + min(i + w * apart, segment.size - 1));
      UNROLL_FOR(int g = 0; g < FLIGHT; g++)
        UNROLL_FOR(int w = 0; w < WEIGHTS; w++)
          if (group + g * segment.shares < segment.groups) sum[w] += value[g][w];
    }
    UNROLL_FOR(int w = 0; w < WEIGHTS; w++) sums[(share * WEIGHTS + w) * apart + lane] = sum[w];
  }

  // sum[w]: of all partial sums of the segment's weight first + w THREADS.
  __device__ __forceinline__ void add_all(const UpdateSegment& segment, int first, float (&sum)[EACH]) const {
    constexpr int FLIGHT = 16 / EACH;
    const float* values = partials + segment.start + first;
    UNROLL_FOR(int w = 0; w < EACH; w++) sum[w] = 0.0f;
    ROLLED_FOR(int group = 0; group < segment.groups; group += FLIGHT, values += FLIGHT * segment.size) {
      float value[FLIGHT][EACH] = {};
      UNROLL_FOR(int g = 0; g < FLIGHT; g++)
        if (group + g < segment.groups)
          UNROLL_FOR(int w = 0; w < EACH; w++)
            if (first + w * THREADS < segment.size) value[g][w] = load_l2(values + g * segment.size + w * THREADS);
      UNROLL_FOR(int g = 0; g < FLIGHT; g++)
        UNROLL_FOR(int w = 0; w < EACH; w++)
          if (group + g < segment.groups) sum[w] += value[g][w];
    }
  }

  // Updates WEIGHTS weights of a thread, one or EACH, by gradients that several threads sum, or it alone. What it updates is
  // loaded before it waits, and the rate afterwards, unless it is known already.
  template <int WEIGHTS, class Wait>
  __device__ __forceinline__ void update_weights(const UpdateSegment& segment, int job, float early_rate,
                                                 const float* __restrict__ late_rate, Wait wait) const {
    const int first = WEIGHTS == 1 ? own_weight(segment, job) : job * WEIGHTS * THREADS + threadIdx.x;
    const auto is_there = [&](int w) { return WEIGHTS == 1 ? first >= 0 : first + w * THREADS < segment.size; };
    float* weights = parameters + segment.offset + first;
    float* speeds = velocity + segment.offset + first;
    float weight[WEIGHTS] = {}, speed[WEIGHTS] = {}, found[WEIGHTS];
    if (apply)
      UNROLL_FOR(int w = 0; w < WEIGHTS; w++)
        if (is_there(w)) weight[w] = weights[w * THREADS], speed[w] = speeds[w * THREADS];
    wait();
    const float rate = late_rate ? *late_rate : early_rate;
    if constexpr (WEIGHTS == 1)
      found[0] = find_gradient(segment, job);
    else
      add_all(segment, first, found);
    UNROLL_FOR(int w = 0; w < WEIGHTS; w++) {
      if (!is_there(w)) continue;
      if (apply) {
        descend(weight[w], speed[w], found[w], rate, momentum, Step::WEIGHT_DECAY);
        weights[w * THREADS] = weight[w], speeds[w * THREADS] = speed[w];
      } else {
        gradient[segment.offset + first + w * THREADS] = found[w];
      }
    }
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
    ROLLED_FOR(int job = blockIdx.x;; job += gridDim.x) {
      int own_job = job, s = 0;
      UpdateSegment segment = {};
      ROLLED_FOR(; s < segment_count; s++) {
        segment = segments[s];
        if (own_job < segment.jobs) break;
        own_job -= segment.jobs;
      }
      if (s == segment_count) {
        const int i = own_job * THREADS + static_cast<int>(threadIdx.x);
        if (!gathers || own_job * THREADS >= count * VECTORS) break;
        gather(i, position, next, wait);
        continue;
      }
      float early = 0.0f;
      if (Step::AHEAD && counts && apply) early = rates[min(max(*position - 1, 0), next.available / count - 1)];
      const float* late = !(Step::AHEAD && counts) && apply ? rates : nullptr;
      if (segment.shares == 1)
        update_weights<EACH>(segment, own_job, early, late, wait);
      else
        update_weights<1>(segment, own_job, early, late, wait);
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
