// Plan `graph` of stage tuned: the last fully connected layers forward, the loss, and their errors back, in one launch.
//
// A block has IMAGES images at a time and the weights of these layers in its shared memory, so that nothing but a barrier
// lies between two layers. It leaves each layer's values and errors, of which update.cuh makes the gradients: products that
// are too small for tensor cores. Weights are copied before the kernel waits for the one before it; see
// wait_for_previous_kernel.
//
// Needs: THREADS, IMAGES, LAYERS, CLASSES, LOSS, FIRST (whether the source is the images), LEAVES_PEAK (as layer.cuh), COUNTS
// (whether this is where a step is counted), BYTES; and for each layer l INPUTS_l, UNITS_l, FUNCTION_l, WEIGHTS_l (where its
// weights, and then its biases, begin in the vector of all parameters), VALUES_l and ERRORS_l (where its source and the errors
// of its sums begin in `traces`, one image after the other).
#pragma once
#include "../../arithmetic.cuh"
#include "../../async.cuh"
#include "../../planes.cuh"

#ifdef __CUDACC__
#define EIGHTFOLD_FOR _Pragma("unroll 8") for
#else
#define EIGHTFOLD_FOR for
#endif

namespace graph {

enum Loss { CROSS_ENTROPY, MEAN_SQUARED_ERROR };
// What a launch does: Pass in cnnlib/engine/device_engine.py.
enum Way { TRAIN, ONLY_FORWARD, GIVEN_ERRORS };

template <class Head, int LAYER>
struct HeadLayer;
#define HEAD_LAYER(l)                                                                           \
  template <class Head>                                                                         \
  struct HeadLayer<Head, l> {                                                                   \
    static constexpr int INPUTS = Head::INPUTS_##l, UNITS = Head::UNITS_##l;                    \
    static constexpr int FUNCTION = Head::FUNCTION_##l, WEIGHTS = Head::WEIGHTS_##l;            \
    static constexpr int VALUES = Head::VALUES_##l, ERRORS = Head::ERRORS_##l;                  \
    /* in shared memory: weights at such a place that copies have 16 bytes, and the biases */   \
    static constexpr int SHIFT = WEIGHTS % 4, BIASES = (SHIFT + UNITS * INPUTS + 3) / 4 * 4;    \
    static constexpr int VALUE_PITCH = (INPUTS + 3) / 4 * 4, ERROR_PITCH = (UNITS + 3) / 4 * 4; \
    static constexpr int ROOM = BIASES + ERROR_PITCH;                                           \
    /* groups of threads that share the terms of an error that is sent back */                  \
    static constexpr int PARTS = larger_of(1, Head::THREADS / ((INPUTS + 31) / 32 * 32));       \
  };
HEAD_LAYER(0)
HEAD_LAYER(1)
HEAD_LAYER(2)
#undef HEAD_LAYER

template <class Head>
struct LastLayers {
  static constexpr int THREADS = Head::THREADS, IMAGES = Head::IMAGES, LAYERS = Head::LAYERS, CLASSES = Head::CLASSES;
  static constexpr int LANES = 32, WARPS = THREADS / LANES;
  static_assert(IMAGES <= WARPS, "a warp has the loss of an image");
  template <int LAYER>
  using At = HeadLayer<Head, LAYER>;
  using Last = At<LAYERS - 1>;
  static_assert(Last::UNITS == CLASSES, "the last layer has a unit for each class");

  // Floats of shared memory: the weights of each layer, its values and its errors, the logits, and sums of several threads.
  template <int LAYER>
  __host__ __device__ static constexpr int weights_at() {
    if constexpr (LAYER == 0)
      return 0;
    else
      return weights_at<LAYER - 1>() + At<LAYER - 1>::ROOM;
  }
  template <int LAYER>
  __host__ __device__ static constexpr int values_at() {
    if constexpr (LAYER == 0)
      return weights_at<LAYERS - 1>() + Last::ROOM;
    else
      return values_at<LAYER - 1>() + IMAGES * At<LAYER - 1>::VALUE_PITCH;
  }
  static constexpr int LOGITS = values_at<LAYERS - 1>() + IMAGES * Last::VALUE_PITCH;
  template <int LAYER>
  __host__ __device__ static constexpr int errors_at() {
    if constexpr (LAYER == 0)
      return LOGITS + IMAGES * Last::ERROR_PITCH;
    else
      return errors_at<LAYER - 1>() + IMAGES * At<LAYER - 1>::ERROR_PITCH;
  }
  static constexpr int SUMS = errors_at<LAYERS - 1>() + IMAGES * Last::ERROR_PITCH;
  template <int LAYER>
  __host__ __device__ static constexpr int sums_of() {
    constexpr int own = At<LAYER>::PARTS * IMAGES * At<LAYER>::VALUE_PITCH;
    if constexpr (LAYER + 1 < LAYERS)
      return larger_of(own, sums_of<LAYER + 1>());
    else
      return own;
  }
  static_assert((SUMS + sums_of<0>()) * 4 <= Head::BYTES, "the launch asks for enough shared memory");

  float* memory;
  float* traces;
  const float* parameters;
  int first, count;  // the first image of the block's, and how many there are in the batch

  template <int LAYER>
  __device__ __forceinline__ void stage_weights() const {
    using Own = At<LAYER>;
    constexpr int SIZE = Own::SHIFT + Own::UNITS * Own::INPUTS, EVEN = SIZE / 4 * 4;
    float* target = memory + weights_at<LAYER>();
    const float* source = parameters + Own::WEIGHTS - Own::SHIFT;
    copy_float4s(target, source, EVEN / 4);
    for (int i = EVEN + threadIdx.x; i < SIZE; i += THREADS) copy_async(target + i, source + i);
    for (int i = threadIdx.x; i < Own::UNITS; i += THREADS)
      copy_async(target + Own::BIASES + i, parameters + Own::WEIGHTS + Own::UNITS * Own::INPUTS + i);
    if constexpr (LAYER + 1 < LAYERS) stage_weights<LAYER + 1>();
  }

  __device__ __forceinline__ void load_source(const float* __restrict__ source) const {
    using Own = At<0>;
    for (int i : block_range(IMAGES * Own::INPUTS)) {
      const int n = i / Own::INPUTS, k = i % Own::INPUTS;
      const float value = first + n < count ? load_l2(source + (first + n) * Own::INPUTS + k) : 0.0f;
      memory[values_at<0>() + n * Own::VALUE_PITCH + k] = value;
      if (first + n < count) traces[Own::VALUES + (first + n) * Own::INPUTS + k] = value;
    }
  }

  // A warp has some units, and its lanes share their terms.
  template <int LAYER>
  __device__ __forceinline__ void go_forward(float* __restrict__ logits) const {
    using Own = At<LAYER>;
    constexpr int AT_ONCE = IMAGES >= 4 ? 1 : 4 / IMAGES;
    constexpr int TARGET = LAYER + 1 < LAYERS ? values_at<LAYER>() + IMAGES * Own::VALUE_PITCH : LOGITS;
    const float* weights = memory + weights_at<LAYER>() + Own::SHIFT;
    const float* values = memory + values_at<LAYER>();
    const int lane = threadIdx.x % LANES;
    for (int u0 = threadIdx.x / LANES * AT_ONCE; u0 < Own::UNITS; u0 += WARPS * AT_ONCE) {
      float sum[AT_ONCE][IMAGES];
      UNROLL_FOR(int u = 0; u < AT_ONCE; u++)
        UNROLL_FOR(int n = 0; n < IMAGES; n++) sum[u][n] = 0.0f;
      const auto add = [&](int k) {
        float value[IMAGES];
        UNROLL_FOR(int n = 0; n < IMAGES; n++) value[n] = values[n * Own::VALUE_PITCH + k];
        UNROLL_FOR(int u = 0; u < AT_ONCE; u++) {
          const float weight = weights[min(u0 + u, Own::UNITS - 1) * Own::INPUTS + k];
          UNROLL_FOR(int n = 0; n < IMAGES; n++) sum[u][n] = fmaf(weight, value[n], sum[u][n]);
        }
      };
      UNROLL_FOR(int k0 = 0; k0 < Own::INPUTS / LANES; k0++) add(k0 * LANES + lane);
      if (Own::INPUTS % LANES > lane) add(Own::INPUTS / LANES * LANES + lane);
      UNROLL_FOR(int u = 0; u < AT_ONCE; u++)
        UNROLL_FOR(int n = 0; n < IMAGES; n++)
          for (int bit = LANES / 2; bit > 0; bit /= 2) sum[u][n] += __shfl_xor_sync(0xffffffffu, sum[u][n], bit);
      UNROLL_FOR(int u = 0; u < AT_ONCE; u++)
        UNROLL_FOR(int n = 0; n < IMAGES; n++)
          if (lane == u * IMAGES + n && u0 + u < Own::UNITS) {
            const int unit = u0 + u, image = first + n;
            const float value = activate<Own::FUNCTION>(sum[u][n] + weights[Own::BIASES - Own::SHIFT + unit]);
            memory[TARGET + n * Own::ERROR_PITCH + unit] = value;
            if (image >= count) continue;
            if constexpr (LAYER + 1 < LAYERS)
              traces[At<LAYER + 1>::VALUES + image * Own::UNITS + unit] = value;
            else
              logits[image * Own::UNITS + unit] = value;
          }
    }
    __syncthreads();
    if constexpr (LAYER + 1 < LAYERS) go_forward<LAYER + 1>(logits);
  }

  // The errors of the last layer's sums, an image a warp. losses (batch,) collects each slot's loss over the steps of an epoch.
  __device__ __forceinline__ void find_errors(const unsigned char* __restrict__ labels,
                                              const float* __restrict__ output_errors, float* __restrict__ losses,
                                              int way) const {
    const int n = threadIdx.x / LANES, lane = threadIdx.x % LANES, image = first + n;
    if (n < IMAGES && image < count) {
      const float* row = memory + LOGITS + n * Last::ERROR_PITCH;
      float* errors = memory + errors_at<LAYERS - 1>() + n * Last::ERROR_PITCH;
      const auto leave = [&](int k, float error) {
        error *= slope<Last::FUNCTION>(row[k]);
        errors[k] = error;
        traces[Last::ERRORS + image * CLASSES + k] = error;
      };
      if (way == GIVEN_ERRORS) {
        for (int k = lane; k < CLASSES; k += LANES) leave(k, output_errors[image * CLASSES + k]);
      } else if (Head::LOSS == CROSS_ENTROPY) {
        float largest = row[0], sum = 0.0f;
        for (int k = lane; k < CLASSES; k += LANES) largest = fmaxf(largest, row[k]);
        for (int bit = LANES / 2; bit > 0; bit /= 2)
          largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, bit));
        for (int k = lane; k < CLASSES; k += LANES) sum += expf(row[k] - largest);
        for (int bit = LANES / 2; bit > 0; bit /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bit);
        const int label = labels[image];
        for (int k = lane; k < CLASSES; k += LANES)
          leave(k, (expf(row[k] - largest) / sum - (k == label ? 1.0f : 0.0f)) / float(count));
        if (lane == 0) losses[image] += logf(sum) + largest - row[label];
      } else {
        const int label = labels[image];
        float sum = 0.0f;
        for (int k = lane; k < CLASSES; k += LANES) {
          const float difference = row[k] - (k == label ? 1.0f : 0.0f);
          sum = fmaf(difference, difference, sum);
          leave(k, difference * (2.0f / float(CLASSES)) / float(count));
        }
        for (int bit = LANES / 2; bit > 0; bit /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bit);
        if (lane == 0) losses[image] += sum / float(CLASSES);
      }
    }
    __syncthreads();
  }

  // Groups of threads share an error's terms, and their sums are added in the order of the groups.
  template <int LAYER>
  __device__ __forceinline__ void go_back(float* __restrict__ source_errors, unsigned& largest) const {
    if constexpr (LAYER > 0 || !Head::FIRST) {
      using Own = At<LAYER>;
      const float* weights = memory + weights_at<LAYER>() + Own::SHIFT;
      const float* errors = memory + errors_at<LAYER>();
      float* sums = memory + SUMS;
      constexpr int EACH = THREADS / Own::PARTS;
      const int part = threadIdx.x / EACH;
      constexpr int INPUTS_EACH = smaller_of(4, ceil_div(Own::INPUTS, EACH));
      if (part < Own::PARTS)
        for (int first_input = threadIdx.x % EACH; first_input < Own::INPUTS; first_input += EACH * INPUTS_EACH) {
          float sum[INPUTS_EACH][IMAGES] = {};
          EIGHTFOLD_FOR(int unit = part; unit < Own::UNITS; unit += Own::PARTS) {
            float weight[INPUTS_EACH];
            UNROLL_FOR(int e = 0; e < INPUTS_EACH; e++)
              weight[e] = weights[unit * Own::INPUTS + smaller_of(first_input + e * EACH, Own::INPUTS - 1)];
            UNROLL_FOR(int n = 0; n < IMAGES; n++) {
              const float error = errors[n * Own::ERROR_PITCH + unit];
              UNROLL_FOR(int e = 0; e < INPUTS_EACH; e++) sum[e][n] = fmaf(weight[e], error, sum[e][n]);
            }
          }
          UNROLL_FOR(int e = 0; e < INPUTS_EACH; e++)
            UNROLL_FOR(int n = 0; n < IMAGES; n++)
              if (first_input + e * EACH < Own::INPUTS)
                sums[(part * IMAGES + n) * Own::VALUE_PITCH + first_input + e * EACH] = sum[e][n];
        }
      __syncthreads();
      for (int i : block_range(IMAGES * Own::INPUTS)) {
        const int n = i / Own::INPUTS, k = i % Own::INPUTS, image = first + n;
        if (image >= count) continue;
        float error = 0.0f;
        UNROLL_FOR(int other = 0; other < Own::PARTS; other++)
          error += sums[(other * IMAGES + n) * Own::VALUE_PITCH + k];
        if constexpr (LAYER > 0) {
          using Before = At<LAYER - 1>;
          error *= slope<Before::FUNCTION>(memory[values_at<LAYER>() + n * Own::VALUE_PITCH + k]);
          memory[errors_at<LAYER - 1>() + n * Before::ERROR_PITCH + k] = error;
          traces[Before::ERRORS + image * Before::UNITS + k] = error;
        } else {
          source_errors[image * Own::INPUTS + k] = error;
          if (Head::LEAVES_PEAK) largest = max(largest, bits_of_size(error));
        }
      }
      __syncthreads();
      if constexpr (LAYER > 0) go_back<LAYER - 1>(source_errors, largest);
    }
  }
};

template <class Head>
__device__ __forceinline__ void run_head(const float* __restrict__ source, const float* __restrict__ parameters,
                                         float* __restrict__ logits, const unsigned char* __restrict__ labels,
                                         const float* __restrict__ output_errors, float* __restrict__ losses,
                                         float* __restrict__ traces, float* __restrict__ source_errors,
                                         unsigned* __restrict__ source_peak, int* __restrict__ position, int way,
                                         int count) {
  SHARED_LARGE(float, memory, Head::BYTES / 4);
  LastLayers<Head> own = {memory, traces, parameters, 0, count};
  // Where all layers belong to the head, the update of these weights may be the kernel before.
  if (Head::FIRST) wait_for_previous_kernel();
  own.template stage_weights<0>();
  if (!Head::FIRST) wait_for_previous_kernel();
  let_next_kernel_start();
  unsigned largest = 0;
  for (own.first = blockIdx.x * Head::IMAGES; own.first < count; own.first += gridDim.x * Head::IMAGES) {
    own.load_source(source);
    wait_for_copies();
    __syncthreads();
    own.template go_forward<0>(logits);
    if (way == ONLY_FORWARD) continue;
    own.find_errors(labels, output_errors, losses, way);
    own.template go_back<Head::LAYERS - 1>(source_errors, largest);
  }
  wait_for_copies();
  if (Head::LEAVES_PEAK) {
    for (int bit = 16; bit > 0; bit /= 2) largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, bit));
    if (threadIdx.x % 32 == 0 && largest > 0) atomicMax(source_peak, largest);
  }
  if (Head::COUNTS && way == TRAIN && blockIdx.x == 0 && threadIdx.x == 0) *position += 1;
}

}  // namespace graph

#define TUNED_GRAPH_HEAD_KERNELS(head)                                                                            \
  ENTRY_POINT_BOUNDED(head, run, head::THREADS)                                                                   \
  (const float* __restrict__ source, const float* __restrict__ parameters, float* __restrict__ logits,            \
   const unsigned char* __restrict__ labels, const float* __restrict__ output_errors, float* __restrict__ losses, \
   float* __restrict__ traces, float* __restrict__ source_errors, unsigned* __restrict__ source_peak,             \
   int* __restrict__ position, int way, int count) {                                                              \
    graph::run_head<head>(source, parameters, logits, labels, output_errors, losses, traces, source_errors,       \
                          source_peak, position, way, count);                                                     \
  }
