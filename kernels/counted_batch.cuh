// A step that finds its images and its learning rate by a counter in device memory: the same launches, with the same
// arguments, make every step of a load, so that they can be captured as a CUDA graph (cnnlib/engine/gpu_steps.py).
#pragma once
#include "arithmetic.cuh"
#include "batch.cuh"
#include "shuffle.cuh"

template <class Network>
struct CountedBatch : Batch<Network> {
  using Base = Batch<Network>;
  static constexpr int IMAGE_SIZE = Base::IMAGE_SIZE;
  static constexpr int TOGETHER = IMAGE_SIZE % 4 == 0 ? 4 : 1;  // pixels that a thread reads at once

  // The beginning of step *position of a load: its images become numbers, its labels lie together, and `rate` (1,) is its
  // learning rate. bytes (N, IMAGE_SIZE), all_labels (N,), order (N,): image i of the step is order[*position count + i].
  // rates (steps,), target (count, IMAGE_SIZE), labels (count,).
  static __device__ __forceinline__ void gather_images(const unsigned char* __restrict__ bytes,
                                                       const unsigned char* __restrict__ all_labels,
                                                       const int* __restrict__ order, const float* __restrict__ rates,
                                                       const int* __restrict__ position, float* __restrict__ target,
                                                       unsigned char* __restrict__ labels, float* __restrict__ rate,
                                                       const Levels& levels, int count) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    constexpr int EACH = IMAGE_SIZE / TOGETHER;
    const int step = *position, first = step * count;
    for (int i : grid_range(count * EACH)) {
      const int pixel = i % EACH * TOGETHER, image = i / EACH;
      const unsigned char* source = bytes + order[first + image] * IMAGE_SIZE + pixel;
      float* to = target + image * IMAGE_SIZE + pixel;
      if (TOGETHER == 4) {
        const uchar4 four = *reinterpret_cast<const uchar4*>(source);
        *reinterpret_cast<Float4*>(to) = {
            {Base::number_of(four.x, pixel, levels), Base::number_of(four.y, pixel + 1, levels),
             Base::number_of(four.z, pixel + 2, levels), Base::number_of(four.w, pixel + 3, levels)}};
      } else {
        *to = Base::number_of(*source, pixel, levels);
      }
    }
    for (int i : grid_range(count)) labels[i] = all_labels[order[first + i]];
    if (blockIdx.x == 0 && threadIdx.x == 0) *rate = rates[step];
  }

  // sum_and_update where every parameter has partial sums, some of them many and others few: a block takes 32 neighbouring
  // weights of the former, whose sums SUM_THREADS threads share, or a weight for each of its threads. The order in which a
  // weight's partial sums are added is that of sum_and_update.
  static __device__ __forceinline__ void sum_and_update_by_segment(
      float* __restrict__ parameters, float* __restrict__ velocity, float* __restrict__ gradient,
      const float* __restrict__ partials, const int* __restrict__ segments, int segment_count,
      const float* __restrict__ learning_rate, float momentum, int apply) {
    constexpr int THREADS = Base::THREADS, SUM_THREADS = Base::SUM_THREADS;
    SHARED(float, sums, THREADS);
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int lane = threadIdx.x % 32, share = threadIdx.x / 32;
    for (int job = blockIdx.x;; job += gridDim.x) {
      int s = 0, own = job, weights = 0;
      for (; s < segment_count; s++) {
        weights = segments[s * 4 + 2] > SUM_THREADS ? 32 : THREADS;
        const int jobs = ceil_div(segments[s * 4 + 1], weights);
        if (own < jobs) break;
        own -= jobs;
      }
      if (s == segment_count) return;
      const int offset = segments[s * 4], size = segments[s * 4 + 1], groups = segments[s * 4 + 2];
      const bool many = weights == 32;
      const int i = own * weights + (many ? lane : static_cast<int>(threadIdx.x));
      const float* values = partials + segments[s * 4 + 3] + i;
      float sum = 0.0f;
      if (i < size)
        for (int group = many ? share : 0; group < groups; group += many ? SUM_THREADS : 1) sum += values[group * size];
      if (many) {
        sums[threadIdx.x] = sum;
        __syncthreads();
        if (share == 0)
          for (int other = 1; other < SUM_THREADS; other++) sum += sums[other * 32 + lane];
        __syncthreads();
      }
      if (i >= size || (many && share > 0)) continue;
      gradient[offset + i] = sum;
      if (apply)
        descend(parameters[offset + i], velocity[offset + i], sum, *learning_rate, momentum, Base::WEIGHT_DECAY);
    }
  }

  // The end of a step. moment: see Draws in cnnlib/engine; position: the next step of the load.
  static __device__ __forceinline__ void count_step(int* __restrict__ moment, int* __restrict__ position) {
    Base::count_step(moment);
    if (blockIdx.x == 0 && threadIdx.x == 0) *position += 1;
  }
};

#define COUNTED_BATCH_KERNELS(network)                                                                         \
  BATCH_KERNELS(network)                                                                                       \
  ENTRY_POINT(network, shuffle_images)                                                                         \
  (const unsigned short* __restrict__ tables, int* __restrict__ order, int half, int count) {                  \
    shuffle_images<network::SHUFFLE_ROUNDS>(tables, order, half, count);                                       \
  }                                                                                                            \
  ENTRY_POINT(network, gather_images)                                                                          \
  (const unsigned char* __restrict__ bytes, const unsigned char* __restrict__ all_labels,                      \
   const int* __restrict__ order, const float* __restrict__ rates, const int* __restrict__ position,           \
   float* __restrict__ target, unsigned char* __restrict__ labels, float* __restrict__ rate, float mean,       \
   float deviation, const float* __restrict__ channels, int count) {                                           \
    CountedBatch<network>::gather_images(bytes, all_labels, order, rates, position, target, labels, rate,      \
                                         {mean, deviation, channels}, count);                                  \
  }                                                                                                            \
  ENTRY_POINT(network, update_and_count)                                                                       \
  (float* __restrict__ parameters, float* __restrict__ velocity, const float* __restrict__ gradient,           \
   const float* __restrict__ learning_rate, float momentum, int count, int* __restrict__ moment,               \
   int* __restrict__ position) {                                                                               \
    CountedBatch<network>::update_parameters(parameters, velocity, gradient, learning_rate, momentum, count);  \
    CountedBatch<network>::count_step(moment, position);                                                       \
  }                                                                                                            \
  ENTRY_POINT(network, sum_update_and_count)                                                                   \
  (float* __restrict__ parameters, float* __restrict__ velocity, float* __restrict__ gradient,                 \
   const float* __restrict__ partials, const int* __restrict__ segments, int segment_count,                    \
   const float* __restrict__ learning_rate, float momentum, int apply, int threads_each, int count,            \
   int* __restrict__ moment, int* __restrict__ position) {                                                     \
    if (threads_each == 0)                                                                                     \
      CountedBatch<network>::sum_and_update_by_segment(parameters, velocity, gradient, partials, segments,     \
                                                       segment_count, learning_rate, momentum, apply);         \
    else                                                                                                       \
      CountedBatch<network>::sum_and_update(parameters, velocity, gradient, partials, segments, segment_count, \
                                            learning_rate, momentum, apply, threads_each, count);              \
    CountedBatch<network>::count_step(moment, position);                                                       \
  }
