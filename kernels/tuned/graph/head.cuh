// Plan `graph` of stage tuned: the last fully connected layers forward, the loss, and their errors back, in one launch.
//
// A block has IMAGES images at a time and the weights of these layers in its shared memory, so that nothing but a barrier
// lies between two layers. It leaves each layer's values and errors, of which update.cuh makes the gradients: products that
// are too small for tensor cores. Weights are copied before the kernel waits for the one before it; see
// wait_for_previous_kernel.
//
// Needs: THREADS, IMAGES, LAYERS, CLASSES, LOSS, FIRST (whether the source is the images), LEAVES_PEAK (as layer.cuh), COUNTS
// (whether this is where a step is counted), BYTES; and for each layer l INPUTS_l, UNITS_l, FUNCTION_l,
// WEIGHTS_l (where its
// weights, and then its biases, begin in the vector of all parameters), VALUES_l and ERRORS_l (where its source and the errors
// of its sums begin in `traces`, one image after the other).
#pragma once
#include "../../arithmetic.cuh"
#include "../../async.cuh"
#include "../../planes.cuh"

#ifdef __CUDACC__
#define FOURFOLD_FOR _Pragma("unroll 4") for
#define EIGHTFOLD_FOR _Pragma("unroll 8") for
#else
#define FOURFOLD_FOR for
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

  // A layer's sizes and places, which are looked up when they are needed: a loop over layers has the code of one. So little
  // code stays in a multiprocessor's cache of instructions from one step to the next.
  struct Sizes {
    int inputs, units, value_pitch, error_pitch, parts;
    int weights, biases, values, target, errors;  // in shared memory
    int parameters, value_traces, target_traces, error_traces;
  };
  template <int LAYER>
  static __device__ __forceinline__ Sizes sizes_of() {
    using Own = At<LAYER>;
    constexpr bool LAST = LAYER + 1 == LAYERS;
    constexpr int WEIGHTS_AT = weights_at<LAYER>(), VALUES_AT = values_at<LAYER>(), ERRORS_AT = errors_at<LAYER>();
    constexpr int AFTER = At < LAST ? LAYER : LAYER + 1 > ::VALUES;
    return {Own::INPUTS,
            Own::UNITS,
            Own::VALUE_PITCH,
            Own::ERROR_PITCH,
            Own::PARTS,
            WEIGHTS_AT + Own::SHIFT,
            WEIGHTS_AT + Own::BIASES,
            VALUES_AT,
            LAST ? LOGITS : VALUES_AT + IMAGES * Own::VALUE_PITCH,
            ERRORS_AT,
            Own::WEIGHTS,
            Own::VALUES,
            AFTER,
            Own::ERRORS};
  }
  template <int LAYER = 0>
  static __device__ __forceinline__ Sizes sizes(int layer) {
    if constexpr (LAYER + 1 == LAYERS)
      return sizes_of<LAYER>();
    else
      return layer == LAYER ? sizes_of<LAYER>() : sizes<LAYER + 1>(layer);
  }
  template <int LAYER = 0>
  static __device__ __forceinline__ float activate_by(int layer, float x) {
    if constexpr (LAYER + 1 == LAYERS)
      return activate<Last::FUNCTION>(x);
    else
      return layer == LAYER ? activate<At<LAYER>::FUNCTION>(x) : activate_by<LAYER + 1>(layer, x);
  }
  template <int LAYER = 0>
  static __device__ __forceinline__ float slope_by(int layer, float y) {
    if constexpr (LAYER + 1 == LAYERS)
      return slope<Last::FUNCTION>(y);
    else
      return layer == LAYER ? slope<At<LAYER>::FUNCTION>(y) : slope_by<LAYER + 1>(layer, y);
  }

  __device__ __forceinline__ void stage_weights() const {
    ROLLED_FOR(int layer = 0; layer < LAYERS; layer++) {
      const Sizes own = sizes(layer);
      const int shift = own.parameters % 4, size = shift + own.units * own.inputs, even = size / 4 * 4;
      float* target = memory + own.weights - shift;
      const float* source = parameters + own.parameters - shift;
      FOURFOLD_FOR(int i = threadIdx.x; i < even / 4; i += THREADS)
      copy_async(reinterpret_cast<Float4*>(target) + i, reinterpret_cast<const Float4*>(source) + i);
      ROLLED_FOR(int i = even + threadIdx.x; i < size; i += THREADS) copy_async(target + i, source + i);
      ROLLED_FOR(int i = threadIdx.x; i < own.units; i += THREADS)
        copy_async(memory + own.biases + i, source + size + i);
    }
  }

  __device__ __forceinline__ void load_source(const float* __restrict__ source) const {
    using Own = At<0>;
    ROLLED_FOR(int i : block_range(IMAGES * Own::INPUTS)) {
      const int n = i / Own::INPUTS, k = i % Own::INPUTS;
      const float value = first + n < count ? load_l2(source + (first + n) * Own::INPUTS + k) : 0.0f;
      memory[values_at<0>() + n * Own::VALUE_PITCH + k] = value;
      if (first + n < count) traces[Own::VALUES + (first + n) * Own::INPUTS + k] = value;
    }
  }

  // A warp has some units, and its lanes share their terms.
  __device__ __forceinline__ void go_forward(float* __restrict__ logits) const {
    constexpr int AT_ONCE = IMAGES >= 4 ? 1 : 4 / IMAGES;
    const int lane = threadIdx.x % LANES;
    ROLLED_FOR(int layer = 0; layer < LAYERS; layer++) {
      const Sizes own = sizes(layer);
      const float* values = memory + own.values;
      float* target = layer + 1 < LAYERS ? traces + own.target_traces : logits;
      ROLLED_FOR(int u0 = threadIdx.x / LANES * AT_ONCE; u0 < own.units; u0 += WARPS * AT_ONCE) {
        float sum[AT_ONCE][IMAGES] = {};
        const float* rows[AT_ONCE];
        UNROLL_FOR(int u = 0; u < AT_ONCE; u++)
          rows[u] = memory + own.weights + min(u0 + u, own.units - 1) * own.inputs;
        FOURFOLD_FOR(int k = lane; k < own.inputs; k += LANES) {
          float value[IMAGES];
          UNROLL_FOR(int n = 0; n < IMAGES; n++) value[n] = values[n * own.value_pitch + k];
          UNROLL_FOR(int u = 0; u < AT_ONCE; u++) {
            const float weight = rows[u][k];
            UNROLL_FOR(int n = 0; n < IMAGES; n++) sum[u][n] = fmaf(weight, value[n], sum[u][n]);
          }
        }
        float found = 0.0f;  // of lane u IMAGES + n: unit u0 + u, image n
        UNROLL_FOR(int u = 0; u < AT_ONCE; u++)
          UNROLL_FOR(int n = 0; n < IMAGES; n++) {
            UNROLL_FOR(int bit = LANES / 2; bit > 0; bit /= 2)
              sum[u][n] += __shfl_xor_sync(0xffffffffu, sum[u][n], bit);
            if (lane == u * IMAGES + n) found = sum[u][n];
          }
        const int unit = u0 + lane / IMAGES, n = lane % IMAGES, image = first + n;
        if (lane >= AT_ONCE * IMAGES || unit >= own.units) continue;
        const float value = activate_by(layer, found + memory[own.biases + unit]);
        memory[own.target + n * own.error_pitch + unit] = value;
        if (image < count) target[image * own.units + unit] = value;
      }
      __syncthreads();
    }
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
        ROLLED_FOR(int k = lane; k < CLASSES; k += LANES) leave(k, output_errors[image * CLASSES + k]);
      } else if (Head::LOSS == CROSS_ENTROPY) {
        float largest = row[0], sum = 0.0f;
        ROLLED_FOR(int k = lane; k < CLASSES; k += LANES) largest = fmaxf(largest, row[k]);
        ROLLED_FOR(int bit = LANES / 2; bit > 0; bit /= 2)
          largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, bit));
        ROLLED_FOR(int k = lane; k < CLASSES; k += LANES) sum += expf(row[k] - largest);
        ROLLED_FOR(int bit = LANES / 2; bit > 0; bit /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bit);
        const int label = labels[image];
        ROLLED_FOR(int k = lane; k < CLASSES; k += LANES)
          leave(k, (expf(row[k] - largest) / sum - (k == label ? 1.0f : 0.0f)) / float(count));
        if (lane == 0) losses[image] += logf(sum) + largest - row[label];
      } else {
        const int label = labels[image];
        float sum = 0.0f;
        ROLLED_FOR(int k = lane; k < CLASSES; k += LANES) {
          const float difference = row[k] - (k == label ? 1.0f : 0.0f);
          sum = fmaf(difference, difference, sum);
          leave(k, difference * (2.0f / float(CLASSES)) / float(count));
        }
        ROLLED_FOR(int bit = LANES / 2; bit > 0; bit /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bit);
        if (lane == 0) losses[image] += sum / float(CLASSES);
      }
    }
    __syncthreads();
  }

  // Groups of threads share an error's terms, and their sums are added in the order of the groups.
  __device__ __forceinline__ void go_back(float* __restrict__ source_errors, unsigned& largest) const {
    float* sums = memory + SUMS;
    ROLLED_FOR(int layer = LAYERS - 1; layer >= (Head::FIRST ? 1 : 0); layer--) {
      const Sizes own = sizes(layer), before = sizes(layer > 0 ? layer - 1 : 0);
      const float* errors = memory + own.errors;
      const int each = THREADS / own.parts, part = threadIdx.x / each;
      if (part < own.parts)
        ROLLED_FOR(int k = threadIdx.x % each; k < own.inputs; k += each) {
          const float* weights = memory + own.weights + k;
          float sum[IMAGES] = {};
          EIGHTFOLD_FOR(int unit = part; unit < own.units; unit += own.parts) {
            const float weight = weights[unit * own.inputs];
            UNROLL_FOR(int n = 0; n < IMAGES; n++) sum[n] = fmaf(weight, errors[n * own.error_pitch + unit], sum[n]);
          }
          UNROLL_FOR(int n = 0; n < IMAGES; n++) sums[(part * IMAGES + n) * own.value_pitch + k] = sum[n];
        }
      __syncthreads();
      ROLLED_FOR(int n = 0; n < IMAGES && first + n < count; n++)
        ROLLED_FOR(int k = threadIdx.x; k < own.inputs; k += THREADS) {
          float error = 0.0f;
          FOURFOLD_FOR(int other = 0; other < own.parts; other++)
          error += sums[(other * IMAGES + n) * own.value_pitch + k];
          const int image = first + n;
          if (layer > 0) {
            error *= slope_by(layer - 1, memory[own.values + n * own.value_pitch + k]);
            memory[before.errors + n * before.error_pitch + k] = error;
            traces[before.error_traces + image * own.inputs + k] = error;
          } else {
            source_errors[image * own.inputs + k] = error;
            if (Head::LEAVES_PEAK) largest = max(largest, bits_of_size(error));
          }
        }
      __syncthreads();
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
  own.stage_weights();
  if (!Head::FIRST) wait_for_previous_kernel();
  let_next_kernel_start();
  unsigned largest = 0;
  ROLLED_FOR(own.first = blockIdx.x * Head::IMAGES; own.first < count; own.first += gridDim.x * Head::IMAGES) {
    own.load_source(source);
    wait_for_copies();
    __syncthreads();
    own.go_forward(logits);
    if (way == ONLY_FORWARD) continue;
    own.find_errors(labels, output_errors, losses, way);
    own.go_back(source_errors, largest);
  }
  wait_for_copies();
  if (Head::LEAVES_PEAK) {
    ROLLED_FOR(int bit = 16; bit > 0; bit /= 2) largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, bit));
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
