// Each layer's mathematics, once, for every stage. The plain loops in cnnlib/layers are the reference.
#pragma once
#include "portable.cuh"

enum Function { IDENTITY, RELU, TANH, SIGMOID };
enum Method { MAX, MEAN };

// Four floats that are loaded as one: 16 bytes, and so aligned.
struct alignas(16) Float4 {
  float at[4];
};

// Four floats by one load, past the first-level cache as load_l2(const float*) does.
__device__ __forceinline__ Float4 load_l2(const Float4* at) {
#ifdef __CUDACC__
  const float4 four = __ldcg(reinterpret_cast<const float4*>(at));
  return {{four.x, four.y, four.z, four.w}};
#else
  return *at;
#endif
}

template <int FUNCTION>
__device__ __forceinline__ float activate(float x) {
  if (FUNCTION == RELU) return x < 0.0f ? 0.0f : x;  // NaN compares false and so stays NaN
  if (FUNCTION == TANH) return tanhf(x);
  if (FUNCTION == SIGMOID) {
    // exp of a large positive number would overflow; the two forms are the same function
    return x >= 0.0f ? 1.0f / (1.0f + expf(-x)) : 1.0f - 1.0f / (1.0f + expf(x));
  }
  return x;
}

// Derivative of the function above in terms of its value y, so that x need not be kept.
template <int FUNCTION>
__device__ __forceinline__ float slope(float y) {
  if (FUNCTION == RELU) return y > 0.0f ? 1.0f : 0.0f;
  if (FUNCTION == TANH) return 1.0f - y * y;
  if (FUNCTION == SIGMOID) return y * (1.0f - y);
  return 1.0f;
}

// One step of gradient descent with momentum: v <- momentum v + g, w <- w - learning_rate v.
__device__ __forceinline__ void descend(float& weight, float& velocity, float gradient, float learning_rate,
                                        float momentum) {
  velocity = fmaf(momentum, velocity, gradient);
  weight = fmaf(-learning_rate, velocity, weight);
}
