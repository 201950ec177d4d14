// Stage tuned: an activation or a subsampling that follows nothing it could be fused with.
// Layer has CHANNELS, HEIGHT, WIDTH (source), FUNCTION, WINDOW (1: no subsampling), METHOD, and the buffers Source,
// Target, Winners (bytes), TargetErrors, SourceErrors (NoBuffer: nothing needs them). IMAGES: 0 where a team takes one
// image at a time; behind a dense layer, those that a block takes together.
#pragma once
#include "../conv.cuh"
#include "context.cuh"

namespace tuned {

template <class Layer, class Threads>
struct Elementwise : LayerDefaults {
  using LayerDefaults::Accumulators;
  static constexpr int CHANNELS = Layer::CHANNELS, HEIGHT = Layer::HEIGHT, WIDTH = Layer::WIDTH;
  static constexpr int FUNCTION = Layer::FUNCTION, WINDOW = Layer::WINDOW, METHOD = Layer::METHOD;
  static constexpr int OUT_ROWS = HEIGHT / WINDOW, OUT_COLUMNS = WIDTH / WINDOW;
  static constexpr int TARGET_SIZE = CHANNELS * OUT_ROWS * OUT_COLUMNS;

  template <class Context>
  static __device__ __forceinline__ void forward(Context& c, int slot) {
    float* const shared = c.shared;
    for_images<Layer::IMAGES>(slot, [=](int image) {
      forward_image(Layer::Source::image(shared, image), Layer::Target::image(shared, image),
                    reinterpret_cast<unsigned char*>(Layer::Winners::image(shared, image)));
    });
  }

  template <class Context>
  static __device__ __forceinline__ void backward(Context& c, int slot, Accumulators&) {
    if constexpr (exists<typename Layer::SourceErrors>) {
      float* const shared = c.shared;
      for_images<Layer::IMAGES>(slot, [=](int image) {
        backward_data(Layer::Target::image(shared, image),
                      reinterpret_cast<unsigned char*>(Layer::Winners::image(shared, image)),
                      Layer::TargetErrors::image(shared, image), Layer::SourceErrors::image(shared, image));
      });
    }
  }

  // first source unit of target unit `at`'s window
  static __device__ __forceinline__ int corner_of(int at) {
    const int map = at / (OUT_ROWS * OUT_COLUMNS), y = at / OUT_COLUMNS % OUT_ROWS, x = at % OUT_COLUMNS;
    return (map * HEIGHT + y * WINDOW) * WIDTH + x * WINDOW;
  }

  static __device__ __forceinline__ void forward_image(const float* source, float* target, unsigned char* winners) {
    for (int at = Threads::thread_rank(); at < TARGET_SIZE; at += Threads::TEAM) {
      float value[WINDOW][WINDOW];
      UNROLL_FOR(int a = 0; a < WINDOW; a++)
        UNROLL_FOR(int b = 0; b < WINDOW; b++) value[a][b] = activate<FUNCTION>(source[corner_of(at) + a * WIDTH + b]);
      int winner;
      target[at] = subsample_window<METHOD>(value, &winner);
      if (WINDOW > 1 && METHOD == MAX) winners[at] = (unsigned char)winner;
    }
  }

  static __device__ __forceinline__ void backward_data(const float* target, const unsigned char* winners,
                                                       const float* errors, float* source_errors) {
    for (int at = Threads::thread_rank(); at < TARGET_SIZE; at += Threads::TEAM) {
      const int winner = WINDOW > 1 && METHOD == MAX ? winners[at] : 0;
      const float error = errors[at] * (WINDOW > 1 ? 1.0f : slope<FUNCTION>(target[at]));
      UNROLL_FOR(int a = 0; a < WINDOW; a++)
        UNROLL_FOR(int b = 0; b < WINDOW; b++)
          source_errors[corner_of(at) + a * WIDTH + b] = METHOD == MEAN             ? error / float(WINDOW * WINDOW)
                                                         : a * WINDOW + b == winner ? error
                                                                                    : 0.0f;
    }
  }
};

}  // namespace tuned
