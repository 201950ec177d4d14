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
      const int weights = segment.apart * segment.units, i = job * weights + thread;
      if (thread < weights && i < segment.size) own[0] = segment.offset + i;
    } else if (thread < TILE_UNITS * TILE_INPUTS) {
      const int wide = segment.apart;
      const int unit = job / wide * TILE_UNITS + thread / LANES, input = job % wide * TILE_INPUTS + thread % LANES;
      if (unit < segment.units && input < segment.inputs) own[0] = segment.offset + unit * segment.inputs + input;
      if (unit < segment.units && input == segment.inputs)
        own[0] = segment.offset + segment.units * segment.inputs + unit;
    }
  }

  // The gradients of these weights.
  __device__ __forceinline__ void find_gradients(const UpdateSegment& segment, int job, float (&found)[EACH]) const {
    const int thread = threadIdx.x;
    __syncthreads();  // the sums of the job before have been read
    int weights = TILE_UNITS * LANES, shares = WARPS;
    if (segment.shares == 0) {
      add_images(segment, job);
    } else {
      if (segment.units == 1)
        add_shares<1>(segment, job, found);
      else
        add_shares<EACH>(segment, job, found);
      if (segment.shares == 1) return;
      weights = segment.apart * segment.units, shares = segment.shares;
    }
    __syncthreads();
    found[0] = 0.0f;
    if (thread < weights)
      FOURFOLD_FOR(int share = 0; share < shares; share++) found[0] += sums[share * weights + thread];
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

  // sum[w], and sums (shares, apart * WEIGHTS) where there are several shares: of every shares-th partial sum of some weights.
  template <int WEIGHTS>
  __device__ __forceinline__ void add_shares(const UpdateSegment& segment, int job, float (&sum)[EACH]) const {
    constexpr int FLIGHT = 16 / WEIGHTS;
    const int apart = segment.apart, lane = threadIdx.x % apart, share = threadIdx.x / apart;
    const int i = job * apart * WEIGHTS + lane, step = segment.size * segment.shares;
    const float* values = partials + segment.start + share * segment.size;
    UNROLL_FOR(int w = 0; w < WEIGHTS; w++) sum[w] = 0.0f;
    ROLLED_FOR(int group = share; group < segment.groups; group += FLIGHT * segment.shares, values += FLIGHT * step) {
      float value[FLIGHT][WEIGHTS];
      UNROLL_FOR(int g = 0; g < FLIGHT; g++)
        UNROLL_FOR(int w = 0; w < WEIGHTS; w++)
          if (group + g * segment.shares < segment.groups)
            value[g][w] = load_l2(values + g * step + min(i + w * apart, segment.size - 1));
      UNROLL_FOR(int g = 0; g < FLIGHT; g++)
        UNROLL_FOR(int w = 0; w < WEIGHTS; w++)
          if (group + g * segment.shares < segment.groups) sum[w] += value[g][w];
    }
    if (segment.shares > 1)
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
