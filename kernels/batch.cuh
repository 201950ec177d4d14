// What every stage does before its first layer and after its last: bytes to numbers, the loss, the update.
#pragma once
#include "layers.cuh"
#include "levels.cuh"

template <class Network>
struct Batch {
  static constexpr int THREADS = Network::THREADS;  // of every block
  static constexpr int IMAGE_SIZE = Network::IMAGE_SIZE, CHANNELS = Network::CHANNELS, CLASSES = Network::CLASSES;
  static constexpr int SUM_THREADS = Network::SUM_THREADS;  // that add one weight's partial sums, where there are many
  static constexpr float WEIGHT_DECAY = Network::WEIGHT_DECAY;
  static_assert(32 * SUM_THREADS == THREADS, "a block has 32 neighbouring weights");

  // (byte - mean) / deviation, for a pixel of an image.
  static __device__ __forceinline__ float number_of(unsigned char byte, int pixel, const Levels& levels) {
    const int channel = pixel / (IMAGE_SIZE / CHANNELS);
    return (float(byte) - levels.mean_of<CHANNELS>(channel)) / levels.deviation_of<CHANNELS>(channel);
  }

  // target[i] = (bytes[i] - mean) / deviation over a whole batch of images. (count, IMAGE_SIZE)
  static __device__ __forceinline__ void normalize_images(const unsigned char* __restrict__ bytes,
                                                          float* __restrict__ target, const Levels& levels, int count) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    for (int i : grid_range(count * IMAGE_SIZE)) target[i] = number_of(bytes[i], i % IMAGE_SIZE, levels);
  }

  // Softmax and cross-entropy, one image a thread. logits (count, CLASSES), labels (count,).
  // errors (count, CLASSES) becomes the derivative of the batch's mean loss: (softmax - one-hot) / count.
  // losses (batch,) collects each slot's loss over the steps of an epoch: one owner a slot, fixed order.
  static __device__ __forceinline__ void softmax_cross_entropy(const float* __restrict__ logits,
                                                               const unsigned char* __restrict__ labels,
                                                               float* __restrict__ errors, float* __restrict__ losses,
                                                               int count) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    for (int image = blockIdx.x * blockDim.x + threadIdx.x; image < count; image += gridDim.x * blockDim.x) {
      const float* row = logits + image * CLASSES;
      const int label = labels[image];
      float largest = row[0];
      for (int k = 1; k < CLASSES; k++) largest = fmaxf(largest, row[k]);
      float sum = 0.0f;
      for (int k = 0; k < CLASSES; k++) sum += expf(row[k] - largest);
      for (int k = 0; k < CLASSES; k++) {
        const float probability = expf(row[k] - largest) / sum;
        errors[image * CLASSES + k] = (probability - (k == label ? 1.0f : 0.0f)) / float(count);
      }
      losses[image] += logf(sum) + largest - row[label];
    }
  }

  // The mean over the classes of (logit - one-hot)^2, with the same arrays: errors becomes its derivative, the batch's
  // mean being over the images too.
  static __device__ __forceinline__ void mean_squared_error(const float* __restrict__ logits,
                                                            const unsigned char* __restrict__ labels,
                                                            float* __restrict__ errors, float* __restrict__ losses,
                                                            int count) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    for (int image = blockIdx.x * blockDim.x + threadIdx.x; image < count; image += gridDim.x * blockDim.x) {
      const int label = labels[image];
      float sum = 0.0f;
      for (int k = 0; k < CLASSES; k++) {
        const float difference = logits[image * CLASSES + k] - (k == label ? 1.0f : 0.0f);
        sum = fmaf(difference, difference, sum);
        errors[image * CLASSES + k] = difference * (2.0f / float(CLASSES)) / float(count);
      }
      losses[image] += sum / float(CLASSES);
    }
  }

  // The end of a step: the masks of the next one are drawn by its number. moment: see Draws in cnnlib/engine.
  static __device__ __forceinline__ void count_step(int* __restrict__ moment) {
    if (blockIdx.x == 0 && threadIdx.x == 0) moment[0] = static_cast<int>(static_cast<unsigned>(moment[0]) + 1u);
  }

  // One step of gradient descent (see descend) over the flat parameter vector. learning_rate (1,).
  static __device__ __forceinline__ void update_parameters(float* __restrict__ parameters, float* __restrict__ velocity,
                                                           const float* __restrict__ gradient,
                                                           const float* __restrict__ learning_rate, float momentum,
                                                           int count) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    for (int i : grid_range(count))
      descend(parameters[i], velocity[i], gradient[i], *learning_rate, momentum, WEIGHT_DECAY);
  }

  // The same update where operators left their gradients as partial sums, one of each group of images.
  // segments (segment_count, 4): offset and size in the flat vector, number of groups, first element in partials.
  // The whole gradient is written too; the parameters change only if `apply`. `threads_each` threads sum one weight:
  // SUM_THREADS where there are many groups (32 neighbouring weights a block, so that many groups are read at once), or
  // one, which needs no barrier.
  static __device__ __forceinline__ void sum_and_update(float* __restrict__ parameters, float* __restrict__ velocity,
                                                        float* __restrict__ gradient,
                                                        const float* __restrict__ partials,
                                                        const int* __restrict__ segments, int segment_count,
                                                        const float* __restrict__ learning_rate, float momentum,
                                                        int apply, int threads_each, int count) {
    SHARED(float, sums, THREADS);
    wait_for_previous_kernel();
    let_next_kernel_start();
    // Sum of every threads_each-th partial of weight i; *partial becomes whether it has any.
    const auto sum_partials = [&](int i, int share, bool* partial) {
      float sum = 0.0f;
      *partial = false;
      for (int s = 0; s < segment_count; s++) {
        const int offset = segments[s * 4], size = segments[s * 4 + 1];
        if (i < offset || i >= offset + size) continue;
        *partial = true;
        const float* values = partials + segments[s * 4 + 3] + i - offset;
        for (int group = share; group < segments[s * 4 + 2]; group += threads_each) sum += values[group * size];
      }
      return sum;
    };
    const auto finish = [&](int i, bool partial, float sum) {
      if (partial) gradient[i] = sum;
      if (apply) descend(parameters[i], velocity[i], gradient[i], *learning_rate, momentum, WEIGHT_DECAY);
    };
    if (threads_each == 1) {
      for (int i : grid_range(count)) {
        bool partial;
        const float sum = sum_partials(i, 0, &partial);
        finish(i, partial, sum);
      }
      return;
    }
    const int lane = threadIdx.x % 32, share = threadIdx.x / 32;
    for (int first = blockIdx.x * 32; first < count; first += gridDim.x * 32) {
      const int i = first + lane;
      bool partial;
      float sum = sum_partials(i, share, &partial);
      sums[threadIdx.x] = sum;
      __syncthreads();
      if (share == 0 && i < count) {
        for (int other = 1; other < SUM_THREADS; other++) sum += sums[other * 32 + lane];
        finish(i, partial, sum);
      }
      __syncthreads();
    }
  }
};

#define BATCH_KERNELS(network)                                                                                       \
  ENTRY_POINT(network, normalize_images)                                                                             \
  (const unsigned char* __restrict__ bytes, float* __restrict__ target, float mean, float deviation,                 \
   const float* __restrict__ channels, int count) {                                                                  \
    Batch<network>::normalize_images(bytes, target, {mean, deviation, channels}, count);                             \
  }                                                                                                                  \
  ENTRY_POINT(network, softmax_cross_entropy)                                                                        \
  (const float* __restrict__ logits, const unsigned char* __restrict__ labels, float* __restrict__ errors,           \
   float* __restrict__ losses, int count) {                                                                          \
    Batch<network>::softmax_cross_entropy(logits, labels, errors, losses, count);                                    \
  }                                                                                                                  \
  ENTRY_POINT(network, mean_squared_error)                                                                           \
  (const float* __restrict__ logits, const unsigned char* __restrict__ labels, float* __restrict__ errors,           \
   float* __restrict__ losses, int count) {                                                                          \
    Batch<network>::mean_squared_error(logits, labels, errors, losses, count);                                       \
  }                                                                                                                  \
  ENTRY_POINT(network, count_step)(int* __restrict__ moment) { Batch<network>::count_step(moment); }                 \
  ENTRY_POINT(network, update_parameters)                                                                            \
  (float* __restrict__ parameters, float* __restrict__ velocity, const float* __restrict__ gradient,                 \
   const float* __restrict__ learning_rate, float momentum, int count) {                                             \
    Batch<network>::update_parameters(parameters, velocity, gradient, learning_rate, momentum, count);               \
  }                                                                                                                  \
  ENTRY_POINT(network, sum_and_update)                                                                               \
  (float* __restrict__ parameters, float* __restrict__ velocity, float* __restrict__ gradient,                       \
   const float* __restrict__ partials, const int* __restrict__ segments, int segment_count,                          \
   const float* __restrict__ learning_rate, float momentum, int apply, int threads_each, int count) {                \
    Batch<network>::sum_and_update(parameters, velocity, gradient, partials, segments, segment_count, learning_rate, \
                                   momentum, apply, threads_each, count);                                            \
  }
