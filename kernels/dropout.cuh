// Dropout's masks (Dropout.mask in cnnlib/layers/dropout.py), which every stage draws alike and none stores.
#pragma once
#include "philox.cuh"

// By what a step's masks are drawn, as kernels get it: Draws in cnnlib/engine/gpu_operator.py.
struct Moment {
  unsigned seed_low, seed_high;  // of the training
  unsigned step;                 // steps done before this one
  bool training;                 // elsewhere nothing is dropped

  __device__ __forceinline__ Moment(int low, int high, int number, bool trains)
      : seed_low(low), seed_high(high), step(number), training(trains) {}
  // moment (2,) on the device: the number of the step, and whether images are trained on
  __device__ __forceinline__ Moment(int low, int high, const int* __restrict__ moment)
      : seed_low(low), seed_high(high), step(moment[0]), training(moment[1] != 0) {}
};

// Factors of the elements of a map, which are numbered in C order. `Layer` has the layer's index in the network (LAYER),
// the least random word that keeps an element (THRESHOLD, the bits of an unsigned number) and the factor of kept elements
// (SCALE).
template <class Layer>
struct Mask {
  static constexpr unsigned LAYER = Layer::LAYER, THRESHOLD = static_cast<unsigned>(Layer::THRESHOLD);
  static constexpr float SCALE = Layer::SCALE;

  // The words of elements 4 block, ..., 4 block + 3 of an image's map; `image` is its position in the batch.
  static __device__ __forceinline__ Words words(const Moment& moment, int image, int block) {
    return philox({{static_cast<unsigned>(block), static_cast<unsigned>(image), moment.step, LAYER}}, moment.seed_low,
                  moment.seed_high);
  }

  static __device__ __forceinline__ bool keeps(unsigned word) { return word >= THRESHOLD; }

  // Whether an element of an image's map is kept in training.
  static __device__ __forceinline__ bool is_kept(const Moment& moment, int image, int element) {
    const Words four = words(moment, image, element / 4);
    // Selected without an index, which would put the four words into memory.
    const unsigned first = element & 1 ? four.at[1] : four.at[0], second = element & 1 ? four.at[3] : four.at[2];
    return keeps(element & 2 ? second : first);
  }

  // value * mask for one element; elsewhere than in training the value itself.
  static __device__ __forceinline__ float apply(float value, const Moment& moment, int image, int element) {
    if (!moment.training) return value;
    return is_kept(moment, image, element) ? value * SCALE : 0.0f;
  }
};
