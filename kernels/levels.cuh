// How a byte of an image becomes a number: (byte - mean) / deviation.
#pragma once
#include "portable.cuh"

struct Levels {
  float mean, deviation;  // of the first channel
  const float* channels;  // (2, CHANNELS): the mean of each channel, then the deviations

  // An image of one channel reads no memory for them.
  template <int CHANNELS>
  __device__ __forceinline__ float mean_of(int channel) const {
    return CHANNELS == 1 ? mean : channels[channel];
  }
  template <int CHANNELS>
  __device__ __forceinline__ float deviation_of(int channel) const {
    return CHANNELS == 1 ? deviation : channels[CHANNELS + channel];
  }
};
