// Each layer's mathematics, once, for every stage. The plain loops in cnnlib/layers are the reference.
#pragma once
#include "portable.cuh"

// Each activation function: its enumerator, its value at x, and its derivative there in terms of that value y (and, for
// GELU, of x). They are those of FUNCTIONS in cnnlib/layers/activation.py, in the same order.
//   RELU: NaN compares false and so stays NaN.
//   SIGMOID: exp of a large positive number would overflow; the two forms are the same function.
#define ACTIVATION_FUNCTIONS(ENTRY)                                                                     \
  ENTRY(RELU, x < 0.0f ? 0.0f : x, y > 0.0f ? 1.0f : 0.0f)                                              \
  ENTRY(LEAKY_RELU, x < 0.0f ? 0.01f * x : x, y > 0.0f ? 1.0f : 0.01f)                                  \
  ENTRY(TANH, tanhf(x), 1.0f - y * y)                                                                   \
  ENTRY(SCALED_TANH, 1.7159f * tanhf(0.6666667f * x), 0.6666667f * (1.7159f - y * y / 1.7159f))         \
  ENTRY(SIGMOID, x >= 0.0f ? 1.0f / (1.0f + expf(-x)) : 1.0f - 1.0f / (1.0f + expf(x)), y * (1.0f - y)) \
  ENTRY(GELU, x * 0.5f * erfcf(-0.7071068f * x), 0.5f * erfcf(-0.7071068f * x) + x * 0.3989423f * expf(-0.5f * x * x))

#define ENUMERATOR(name, value, derivative) , name
enum Function { IDENTITY ACTIVATION_FUNCTIONS(ENUMERATOR) };
#undef ENUMERATOR
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
#define VALUE(name, value, derivative) \
  if (FUNCTION == name) return value;
  ACTIVATION_FUNCTIONS(VALUE)
#undef VALUE
  return x;
}

// Derivative of the function above at x, where its value is y. Only GELU reads x.
template <int FUNCTION>
__device__ __forceinline__ float slope(float x, float y) {
#define DERIVATIVE(name, value, derivative) \
  if (FUNCTION == name) return derivative;
  ACTIVATION_FUNCTIONS(DERIVATIVE)
#undef DERIVATIVE
  return 1.0f;
}

// Derivative of a function whose value y is enough to know it, so that x need not be kept.
template <int FUNCTION>
__device__ __forceinline__ float slope(float y) {
  static_assert(FUNCTION != GELU, "the derivative of this function needs its source");
  return slope<FUNCTION>(0.0f, y);
}

// One step of gradient descent with momentum: g <- g + weight_decay w, v <- momentum v + g, w <- w - learning_rate v.
// weight_decay is a constant of the network, so that a training without any computes nothing for it.
__device__ __forceinline__ void descend(float& weight, float& velocity, float gradient, float learning_rate,
                                        float momentum, float weight_decay = 0.0f) {
  if (weight_decay != 0.0f) gradient = fmaf(weight_decay, weight, gradient);
  velocity = fmaf(momentum, velocity, gradient);
  weight = fmaf(-learning_rate, velocity, weight);
}
