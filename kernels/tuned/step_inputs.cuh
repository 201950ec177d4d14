// What a step is given: the arguments of a launch, and images on their way into shared memory.
#pragma once
#include "context.cuh"
#include "planes.cuh"
#include "tensor.cuh"

namespace tuned {

// What both phases of a step work on.
struct Step {
  const unsigned char* images;  // (N, IMAGE_SIZE)
  const unsigned char* labels;  // (N,)
  const int* order;             // (count,): which of them make the batch
  float* parameters;
  float* traces;    // (count, TRACE)
  float* partials;  // (groups, PARTIALS): sums of the convolutions' gradient, a block's each
  float* outputs;   // (count, CLASSES): logits or, where errors are given, those
  float* losses;    // (count,), added to
  float* stash;     // (grid, IMAGES, KEPT): what backward will ask for, while a block takes other images forward
  Levels levels;
  int seed_low, seed_high, number;  // of dropout's masks: the training's seed, and steps done before this one
  int count;
};

// Blocks that have images: block b takes images b, b + grid, ...
__device__ __forceinline__ int groups_of(int count) { return min(static_cast<int>(gridDim.x), count); }

// A team's next image on its way from device memory, each thread's share of the bytes in its registers.
template <class Plan>
struct NextImage {
  using Threads = typename Plan::Threads;
  static constexpr int TEAM = Threads::TEAM, TEAMS = Threads::TEAMS, IMAGE_SIZE = Plan::IMAGE_SIZE;
  static constexpr int PIXELS = ceil_div(IMAGE_SIZE, TEAM);
  // The image with its border, as it lies in shared memory.
  static constexpr int CHANNELS = Plan::CHANNELS, WIDTH = Plan::WIDTH, HEIGHT = IMAGE_SIZE / (CHANNELS * WIDTH);
  static constexpr int BORDER_ROWS = Plan::BORDER_ROWS, BORDER_COLUMNS = Plan::BORDER_COLUMNS;
  static constexpr int ALL_ROWS = HEIGHT + 2 * BORDER_ROWS, ALL_COLUMNS = WIDTH + 2 * BORDER_COLUMNS;
  static constexpr int PLACES = CHANNELS * ALL_ROWS * ALL_COLUMNS, ZEROS = PLACES - IMAGE_SIZE;
  unsigned char byte[PIXELS];
  int label;
  // The image after it: already its place in the data set, so that fetching it waits for nothing. -1: there is none.
  int next, image, steps;
  const int* order;

  // Images of `steps` steps, whose orders follow each other.
  __device__ __forceinline__ void begin(const Step& step, int steps_to_come) {
    order = step.order, image = first_image(), steps = image < step.count ? steps_to_come : 0;
    find();
    fetch(step);
  }
  // A block has images b, b + grid, ...; its teams take them by turns.
  static __device__ __forceinline__ int first_image() { return blockIdx.x + Threads::team() * gridDim.x; }
  __device__ __forceinline__ void find() { next = steps > 0 ? order[image] : -1; }

  __device__ __forceinline__ void fetch(const Step& step) {
    if (next < 0) return;
    const unsigned char* bytes = step.images + static_cast<long long>(next) * IMAGE_SIZE;
    UNROLL_FOR(int n = 0; n < PIXELS; n++)
      if (Threads::thread_rank() + n * TEAM < IMAGE_SIZE) byte[n] = bytes[Threads::thread_rank() + n * TEAM];
    label = step.labels[next];
    image += TEAMS * gridDim.x;
    if (image >= step.count) image = first_image(), order += step.count, steps--;
    find();
  }

  // Where pixel `i` of the image lies within its border.
  static __device__ __forceinline__ int place_of(int i) {
    if (ZEROS == 0) return i;
    const int line = i / WIDTH, channel = line / HEIGHT;
    return ((2 * channel + 1) * BORDER_ROWS + line) * ALL_COLUMNS + BORDER_COLUMNS + i % WIDTH;
  }
  // Where number `i` of the border lies: of each channel the rows above and below, then what is beside its own rows.
  static __device__ __forceinline__ int place_of_zero(int i) {
    constexpr int OF_ROWS = 2 * BORDER_ROWS * ALL_COLUMNS, ALL = ZEROS ? ZEROS / CHANNELS : 1;
    constexpr int BESIDE = BORDER_COLUMNS ? 2 * BORDER_COLUMNS : 1;
    const int channel = i / ALL, at = i % ALL, beside = at - OF_ROWS;
    const int row = at < OF_ROWS ? at / ALL_COLUMNS : BORDER_ROWS + beside / BESIDE;
    const int column = at < OF_ROWS ? at % ALL_COLUMNS : beside % BESIDE;
    return (channel * ALL_ROWS + row + (at < OF_ROWS && row >= BORDER_ROWS ? HEIGHT : 0)) * ALL_COLUMNS + column +
           (at >= OF_ROWS && column >= BORDER_COLUMNS ? WIDTH : 0);
  }

  // As a number of the first of two in its own word, and of the second in the word before.
  static __device__ __forceinline__ void put(unsigned short* halves, int place, unsigned short number) {
    halves[2 * place] = number;
    halves[place ? 2 * place - 1 : 2 * PLACES - 1] = place ? number : 0;
  }

  // image: normalised floats or, with BYTES, words of a pixel and the one behind it. If there is none, an empty one, so
  // that every team does the same; its errors will be 0. The border is written each time, since other arrays lie over
  // the image when no image is left.
  __device__ __forceinline__ void arrive(const Step& step, bool any, float* there, int* label_there) const {
    UNROLL_FOR(int n = 0; n < PIXELS; n++) {
      const int i = Threads::thread_rank() + n * TEAM;
      if (i >= IMAGE_SIZE) break;
      const int pixel = any ? byte[n] : 0;
      if (Plan::BYTES) {
        put(reinterpret_cast<unsigned short*>(there), place_of(i), Plan::PLANES ? to_fp16(pixel) : to_bf16(pixel));
      } else {
        const int channel = i / (IMAGE_SIZE / CHANNELS);
        there[place_of(i)] = (float(pixel) - step.levels.template mean_of<CHANNELS>(channel)) /
                             step.levels.template deviation_of<CHANNELS>(channel);
      }
    }
    if constexpr (ZEROS > 0) {
      for (int i = Threads::thread_rank(); i < ZEROS; i += TEAM) {
        if (Plan::BYTES)
          put(reinterpret_cast<unsigned short*>(there), place_of_zero(i), 0);
        else
          there[place_of_zero(i)] = 0.0f;
      }
    }
    if (Threads::thread_rank() == 0) *label_there = any ? label : 0;
  }
};

}  // namespace tuned
