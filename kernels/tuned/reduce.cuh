// Stage tuned, second phase: what is done with a gradient once it is summed, and the sum of convolutions' gradients, of
// which every block has left its own images' part.
#pragma once
#include "context.cuh"
#include "stamps.cuh"

namespace tuned {

// What the first phase has left: traces (count, Plan::TRACE), partials (groups, Plan::PARTIALS).
struct Gradients {
  using Number = float;
  const float* all_traces;
  const float* partials;
  int count, groups;
  static constexpr bool STAMPED = false;
  __device__ __forceinline__ const float* traces() const { return all_traces; }
  // A weight's own number is left to others here too; nothing to do.
  __device__ __forceinline__ void leave(int, float) const {}
};

// The same, as other blocks leave it: every number is waited for.
struct StampedGradients {
  using Number = Stamped;
  Handed from;
  unsigned stamp;
  int count, groups;
  Patience& patience;
  static constexpr bool STAMPED = true;
  __device__ __forceinline__ const Stamped* traces() const { return from.traces; }
  // Weight i of the convolutions, after the step.
  __device__ __forceinline__ void leave(int i, float weight) const { store_stamped(from.weights + i, weight, stamp); }
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
  // Returns the weight as it is then.
  __device__ __forceinline__ float apply(int i, Weight now, float sum) const {
    if (gradient) {
      gradient[i] = sum;
      return now.weight;
    }
    descend(now.weight, now.velocity, sum, learning_rate, momentum, weight_decay);
    parameters[i] = now.weight;
    velocity[i] = now.velocity;
    return now.weight;
  }
  // That of the parameters from `offset` on.
  __device__ __forceinline__ Update from(int offset) const {
    return {parameters + offset, velocity + offset, gradient ? gradient + offset : nullptr,
            learning_rate,       momentum,          weight_decay};
  }
};

// Where a convolution's numbers begin in a block's partial sums and among the parameters, and how many there are.
struct PartialsSizes {
  int first_partial, first_weight, parameters;
};

constexpr int PARTIALS_TILE = 64;  // weights of a convolution that a block sums together

// The sum over all groups of `size` weights' gradients, from `first` on; PITCH: floats from a group's partial sums to
// the next one's. AT_ONCE: all are asked for together, for which kernels of several images a block have no registers.
// shared: BLOCK floats.
// Stamped numbers are asked for all the time from the moment on when the image of the thread's last group has come back
// from the dense layers. The first number of its trace shows that; TRACE: floats of a trace, 0 without dense layers.
template <class Threads, int PITCH, int TRACE, bool AT_ONCE, class Gradients>
__device__ __forceinline__ void reduce_partials(Gradients& gradients, int first, int size, float* shared,
                                                const Update& update) {
  constexpr int SHARES = Threads::BLOCK / PARTIALS_TILE;
  static_assert(SHARES * PARTIALS_TILE == Threads::BLOCK, "every thread has a weight");
  const int share = threadIdx.x / PARTIALS_TILE, i = threadIdx.x % PARTIALS_TILE;
  Update::Weight now;
  if (share == 0 && i < size) now = update.fetch(i);
  float sum = 0.0f;
  if constexpr (Gradients::STAMPED) {
    constexpr int TOGETHER = 16;
    if (i < size) {
#pragma unroll 1
      for (int group = share; group < gradients.groups; group += SHARES * TOGETHER) {
        float value[TOGETHER];
        const Stamped* from = gradients.from.partials + first + i;
        if (TRACE) {
          float ignored[1];
          const int last = group + (min(TOGETHER, (gradients.groups - group + SHARES - 1) / SHARES) - 1) * SHARES;
          take_stamped(
              ignored, [&](int) { return gradients.from.traces + last * TRACE; }, gradients.stamp, gradients.patience);
        }
        take_stamped<true>(
            value,
            [&](int n) {
              return group + n * SHARES < gradients.groups ? from + (group + n * SHARES) * PITCH : nullptr;
            },
            gradients.stamp, gradients.patience);
        UNROLL_FOR(int n = 0; n < TOGETHER; n++) sum += value[n];
      }
    }
  } else if (AT_ONCE && i < size) {
    // those of all blocks of a GPU, by eights that nothing has to wait for
    constexpr int EIGHTS = 3;
#pragma unroll 1
    for (int group = share; group < gradients.groups; group += SHARES * 8 * EIGHTS) {
      const float* from = gradients.partials + group * PITCH + first + i;
      const int left = ceil_div(gradients.groups - group, SHARES);
      float value[8 * EIGHTS];
      UNROLL_FOR(int eight = 0; eight < EIGHTS; eight++)
        if (eight * 8 < left)
          UNROLL_FOR(int n = eight * 8; n < eight * 8 + 8; n++)
            value[n] = n < left ? load_l2(from + n * SHARES * PITCH) : 0.0f;
      UNROLL_FOR(int eight = 0; eight < EIGHTS; eight++)
        if (eight * 8 < left)
          UNROLL_FOR(int n = eight * 8; n < eight * 8 + 8; n++) sum += value[n];
    }
  } else if (i < size) {
#pragma unroll 8
    for (int group = share; group < gradients.groups; group += SHARES)
      sum += load_l2(gradients.partials + group * PITCH + first + i);
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (share == 0 && i < size) {
    for (int other = 1; other < SHARES; other++) sum += shared[other * PARTIALS_TILE + i];
    gradients.leave(first + i, update.apply(i, now, sum));
  }
  __syncthreads();
}

}  // namespace tuned
