// Stage tuned: dropout. Layer has SIZE, what Mask (../dropout.cuh) needs, and the buffers Source, Target, TargetErrors and
// SourceErrors (NoBuffer: nothing needs them). IMAGES: 0 where a team takes one image at a time; behind a dense layer,
// those that a block takes together.
#pragma once
#include "../dropout.cuh"
#include "context.cuh"

namespace tuned {

template <class Layer, class Threads>
struct Dropout : LayerDefaults {
  using LayerDefaults::Accumulators;
  static constexpr int SIZE = Layer::SIZE;

  template <class Context>
  static __device__ __forceinline__ void forward(Context& c, int slot) {
    for_images<Layer::IMAGES>(slot, [&](int image) {
      mask(c, image, Layer::Source::image(c.shared, image), Layer::Target::image(c.shared, image));
    });
  }

  template <class Context>
  static __device__ __forceinline__ void backward(Context& c, int slot, Accumulators&) {
    if constexpr (exists<typename Layer::SourceErrors>) {
      for_images<Layer::IMAGES>(slot, [&](int image) {
        mask(c, image, Layer::TargetErrors::image(c.shared, image), Layer::SourceErrors::image(c.shared, image));
      });
    }
  }

  // to[i] = from[i] * mask[i] for image number `image` of those that the block takes together. A thread has four elements,
  // which share a random number.
  template <class Context>
  static __device__ __forceinline__ void mask(const Context& c, int image, const float* from, float* to) {
    const int position = c.first + image * static_cast<int>(gridDim.x);
    for (int block = Threads::thread_rank(); block < ceil_div(SIZE, 4); block += Threads::TEAM) {
      Words words = {};
      if (c.moment.training) words = Mask<Layer>::words(c.moment, position, block);
      UNROLL_FOR(int n = 0; n < 4; n++) {
        const int element = block * 4 + n;
        if (element >= SIZE) break;
        const float value = from[element];
        to[element] = !c.moment.training ? value : Mask<Layer>::keeps(words.at[n]) ? value * Mask<Layer>::SCALE : 0.0f;
      }
    }
  }
};

}  // namespace tuned
