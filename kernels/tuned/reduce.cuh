// Stage tuned, second phase: what is done with a gradient once it is summed, and the sum of convolutions' gradients, of
// which every block has left its own images' part.
#pragma once
#include "context.cuh"

namespace tuned {

// What the first phase has left: traces (count, Plan::TRACE), partials (groups, Plan::PARTIALS).
struct Gradients {
  const float* traces;
  const float* partials;
  int count, groups;
};

// One step of gradient descent (see descend) for each weight whose gradient is summed or, where `gradient` is given,
// the gradient itself: then the weights stay as they are.
struct Update {
  struct Weight {
    float weight, velocity;
  };
  float* parameters;
  float* velocity;
  float* gradient;
  float learning_rate, momentum, weight_decay;

  // fetch(i) is asked for long before its sum is there; apply(i, that, sum) changes weight i.
  __device__ __forceinline__ Weight fetch(int i) const {
    return gradient ? Weight{0.0f, 0.0f} : Weight{load_l2(parameters + i), load_l2(velocity + i)};
  }
  __device__ __forceinline__ void apply(int i, Weight now, float sum) const {
    if (gradient) {
      gradient[i] = sum;
      return;
    }
    descend(now.weight, now.velocity, sum, learning_rate, momentum, weight_decay);
    parameters[i] = now.weight;
    velocity[i] = now.velocity;
  }
  // That of the parameters from `offset` on.
  __device__ __forceinline__ Update from(int offset) const {
    return {parameters + offset, velocity + offset, gradient ? gradient + offset : nullptr,
            learning_rate,       momentum,          weight_decay};
  }
};

constexpr int PARTIALS_TILE = 64;  // weights of a convolution that a block sums together

// The sum over all groups of `size` weights' gradients, from `first` on; PITCH: floats from a group's partial sums to
// the next one's. shared: BLOCK floats.
template <class Threads, int PITCH>
__device__ __forceinline__ void reduce_partials(const Gradients& gradients, int first, int size, float* shared,
                                                const Update& update) {
  constexpr int SHARES = Threads::BLOCK / PARTIALS_TILE;
  static_assert(SHARES * PARTIALS_TILE == Threads::BLOCK, "every thread has a weight");
  const int share = threadIdx.x / PARTIALS_TILE, i = threadIdx.x % PARTIALS_TILE;
  Update::Weight now;
  if (share == 0 && i < size) now = update.fetch(i);
  float sum = 0.0f;
  if (i < size) {
#pragma unroll 8
    for (int group = share; group < gradients.groups; group += SHARES)
      sum += load_l2(gradients.partials + group * PITCH + first + i);
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (share == 0 && i < size) {
    for (int other = 1; other < SHARES; other++) sum += shared[other * PARTIALS_TILE + i];
    update.apply(i, now, sum);
  }
  __syncthreads();
}

}  // namespace tuned
