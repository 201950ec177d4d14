// Stage tuned: the convolution that the image itself goes into, with stride 1; otherwise as conv.cuh. The image stays
// bytes, which BF16 holds exactly, and the sums are normalised instead of it:
//   sum of weight (byte - mean) / deviation = (sum of weight byte - mean sum of weight) / deviation,
// and so for the gradient, where deltas are in the weights' place. Where channels have deviations of their own, each
// one's weights are scaled by that of the first channel over its own, so that one division serves all sums.
// Source is words: each pixel and the one behind it as two BF16, so that any two neighbours are one load.
// Layer has what conv_common.cuh says and: WEIGHT_PITCH (words from a map's weights to the next one's), RawWeights
// (where the parameters arrive as they are).
#pragma once
#include "conv_common.cuh"

namespace tuned {

// What normalised bytes need beside the products of bytes as they are.
template <int CHANNELS, int KERNEL, int MAPS>
struct RawBytes {
  static constexpr int AREA = KERNEL * KERNEL, TERMS = CHANNELS * AREA;

  template <class Context>
  static __device__ __forceinline__ float mean_of(const Context& c, int channel) {
    return c.levels.template mean_of<CHANNELS>(channel);
  }
  template <class Context>
  static __device__ __forceinline__ float deviation_of(const Context& c, int channel) {
    return c.levels.template deviation_of<CHANNELS>(channel);
  }

  // What a channel's weights are multiplied by, so that a division by deviation_of(c, 0) serves all sums.
  template <class Context>
  static __device__ __forceinline__ float scale_of(const Context& c, int channel) {
    return deviation_of(c, 0) / deviation_of(c, channel);
  }

  // What is added to a map's sums after that division. raw: weights (MAPS, TERMS), then bias (MAPS,).
  template <class Context>
  static __device__ __forceinline__ float bias(const Context& c, const float* raw, int map) {
    float added = raw[MAPS * TERMS + map];
#pragma unroll 1
    for (int channel = 0; channel < CHANNELS; channel++) {
      float sum = 0.0f;
#pragma unroll 5
      for (int term = 0; term < AREA; term++) sum += raw[map * TERMS + channel * AREA + term];
      added -= mean_of(c, channel) / deviation_of(c, channel) * sum;
    }
    return added;
  }

  // The gradient of a term's weight, from the sum of deltas by bytes and that of deltas.
  template <class Context>
  static __device__ __forceinline__ float gradient(const Context& c, float total, float deltas, int term) {
    const int channel = term / AREA;
    return (total - mean_of(c, channel) * deltas) / deviation_of(c, channel);
  }
};

template <class Layer, class Threads, class Split = SplitBF16x3>
struct ByteConv : ConvCommon<Layer, Threads> {
  using Common = ConvCommon<Layer, Threads>;
  using Common::AREA, Common::BLOCK, Common::CHANNELS, Common::COLUMNS, Common::first_term, Common::FORWARD_M_TILES,
      Common::FULL_PITCH, Common::HEIGHT, Common::KERNEL, Common::MAPS, Common::N_TILES, Common::own_split,
      Common::PARAMETERS, Common::POSITION_TILES, Common::ROWS, Common::TERMS, Common::thread_rank, Common::WARPS,
      Common::WEIGHTS_SPLIT_K, Common::WIDTH;
  using typename Common::Accumulators;
  using Raw = RawBytes<CHANNELS, KERNEL, MAPS>;

  // Pairs of neighbours along a row: of weights forward, of positions for the gradient. A row's last may be half empty.
  static constexpr int WEIGHT_PAIRS = ceil_div(KERNEL, 2), TERM_PAIRS = CHANNELS * KERNEL * WEIGHT_PAIRS;
  static constexpr int COLUMN_PAIRS = ceil_div(COLUMNS, 2), AREA_PAIRS = ROWS * COLUMN_PAIRS;
  static constexpr int K_TILES = ceil_div(TERM_PAIRS, 8), POSITION_K_TILES = ceil_div(AREA_PAIRS, 8);
  static constexpr int WEIGHT_PITCH = Layer::WEIGHT_PITCH;
  static_assert(Split::K == 16, "tiles of eight pairs");
  static_assert(Layer::STRIDE == 1 && Layer::FORWARD_SPLIT_K == 1, "there are few terms");
  static_assert(WEIGHT_PITCH >= K_TILES * 8, "tiles of weights lie within a map's");
  static_assert(!exists<typename Layer::SourceErrors>, "the image's errors are needed by nothing");

  // Weights (as words, (3, MAPS, WEIGHT_PITCH), then (MAPS,) what is added to the sums) are made of the raw parameters.
  static constexpr bool COPIES = true;
  template <class Context>
  static __device__ __forceinline__ void copy_weights(Context& c) {
    Common::copy_parameters(c, Layer::RawWeights::all(c.shared));
  }

  template <class Context>
  static __device__ __forceinline__ void convert_weights(Context& c) {
    const float* raw = Layer::RawWeights::all(c.shared);
    float* weights = Layer::Weights::all(c.shared);
    unsigned* words = reinterpret_cast<unsigned*>(weights);
#pragma unroll 1
    for (int i = threadIdx.x; i < MAPS * K_TILES * 8; i += BLOCK) {
      const int map = i / (K_TILES * 8), pair = i % (K_TILES * 8);
      const int row = pair / WEIGHT_PAIRS, column = pair % WEIGHT_PAIRS * 2;
      const float* weight = raw + map * TERMS + row * KERNEL + column;
      Pair two = {pair < TERM_PAIRS ? weight[0] : 0.0f, pair < TERM_PAIRS && column + 1 < KERNEL ? weight[1] : 0.0f};
      if (CHANNELS > 1) {
        const float scale = Raw::scale_of(c, min(row / KERNEL, CHANNELS - 1));
        two = {two.x * scale, two.y * scale};
      }
      unsigned parts[3];
      Split::split(two, parts);
      UNROLL_FOR(int part = 0; part < 3; part++) words[(part * MAPS + map) * WEIGHT_PITCH + pair] = parts[part];
    }
    // by the last threads, which have less to do above
    for (int map = BLOCK - 1 - threadIdx.x; map < MAPS; map += BLOCK)
      weights[3 * MAPS * WEIGHT_PITCH + map] = Raw::bias(c, raw, map);
  }

  template <class Context>
  static __device__ __forceinline__ void forward(Context& c, int slot) {
    float* const shared = c.shared;
    forward_image(Layer::Source::image(shared, slot), Layer::Weights::all(shared), Layer::Target::image(shared, slot),
                  Common::winners_of(shared, slot), Layer::Full::image(shared, slot),
                  Layer::Scratch::image(shared, slot), Raw::deviation_of(c, 0));
  }

  // image: words (CHANNELS, HEIGHT, WIDTH) -> target (TARGET_SIZE,). scratch: MAPS * FULL_PITCH floats.
  static __device__ __forceinline__ void forward_image(const float* image, const float* weights, float* target,
                                                       unsigned char* winners, float* full, float* scratch,
                                                       float deviation) {
    constexpr int TASKS = ceil_div(POSITION_TILES, FORWARD_M_TILES);
    const unsigned* pixels = reinterpret_cast<const unsigned*>(image);
    const unsigned* weight_words = reinterpret_cast<const unsigned*>(weights);
    for (int task = thread_rank() / 32; task < TASKS; task += WARPS) {
      const int position0 = task * FORWARD_M_TILES * 16;
      Fragment sum[FORWARD_M_TILES][N_TILES];
      ::clear(sum);
      UNROLL_FOR(int k = 0; k < K_TILES; k++)
        Split::multiply(
            sum,
            [&](int m, int row, int pair) {
              const int position = min(position0 + m * 16 + row, AREA - 1);
              const int term = min(k * 8 + pair, TERM_PAIRS - 1);
              const int line = term / WEIGHT_PAIRS, column = term % WEIGHT_PAIRS * 2;
              return pixels[position / COLUMNS * WIDTH + position % COLUMNS +
                            (line / KERNEL * HEIGHT + line % KERNEL) * WIDTH + column];
            },
            [&](int n, int pair, int map, unsigned (&words)[3]) {
              UNROLL_FOR(int part = 0; part < 3; part++)
                words[part] = weight_words[(part * MAPS + min(n * 8 + map, MAPS - 1)) * WEIGHT_PITCH + k * 8 + pair];
            });
      Common::store_sums(sum, position0, scratch);
    }
    Threads::template team_barrier<ByteConv>();
    Common::finish(weights + 3 * MAPS * WEIGHT_PITCH, target, winners, full, scratch, 1.0f / deviation);
  }

  template <class Context>
  static __device__ __forceinline__ void backward(Context& c, int slot, Accumulators& sums) {
    float* const shared = c.shared;
    float* const full = Layer::Full::image(shared, slot);
    Common::unpool(Layer::Target::image(shared, slot), Common::winners_of(shared, slot),
                   Layer::TargetErrors::image(shared, slot), full);
    Threads::template team_barrier<ByteConv>();
    backward_weights(Layer::Source::image(shared, slot), full, sums);
  }

  // sums += this image's share: deltas x bytes and, as the last term, deltas.
  static __device__ __forceinline__ void backward_weights(const float* image, const float* full, Accumulators& sums) {
    const int split = own_split(), term0 = first_term();
    if (split >= WEIGHTS_SPLIT_K) return;
    const unsigned* pixels = reinterpret_cast<const unsigned*>(image);
#pragma unroll 2
    for (int k = split; k < POSITION_K_TILES; k += WEIGHTS_SPLIT_K)
      Split::multiply(
          sums.tile,
          [&](int m, int row, int pair) {
            const int term = term0 + m * 16 + row, known = min(term, TERMS - 1);
            const int at = min(k * 8 + pair, AREA_PAIRS - 1);
            const unsigned two = pixels[(known / (KERNEL * KERNEL) * HEIGHT + known / KERNEL % KERNEL) * WIDTH +
                                        known % KERNEL + at / COLUMN_PAIRS * WIDTH + at % COLUMN_PAIRS * 2];
            return term == TERMS ? TWO_ONES : two;
          },
          [&](int n, int pair, int map, unsigned (&words)[3]) {
            const int at = k * 8 + pair, column = at % COLUMN_PAIRS * 2;
            const float* delta = full + min(n * 8 + map, MAPS - 1) * FULL_PITCH + at / COLUMN_PAIRS * COLUMNS + column;
            Pair two = {0.0f, 0.0f};
            if (at < AREA_PAIRS) {
              if (COLUMNS % 2 == 0 && FULL_PITCH % 2 == 0)
                two = *reinterpret_cast<const Pair*>(delta);
              else
                two = {delta[0], column + 1 < COLUMNS ? delta[1] : 0.0f};
            }
            Split::split(two, words);
          });
  }

  // The layer's partial sums = weight gradient (MAPS, TERMS), then bias gradient. After stage_gradient and a barrier.
  template <class Context>
  static __device__ __forceinline__ void store_gradient(Context& c, float* partials) {
    float* partial = partials + Layer::FIRST_PARTIAL;
    const float* scratch = Layer::Staged::all(c.shared);
    for (int i = threadIdx.x; i < PARAMETERS; i += BLOCK) {
      const int map = i < MAPS * TERMS ? i / TERMS : i - MAPS * TERMS;
      const float deltas = Common::total_of(scratch, map, TERMS);
      partial[i] =
          i < MAPS * TERMS ? Raw::gradient(c, Common::total_of(scratch, map, i % TERMS), deltas, i % TERMS) : deltas;
    }
  }
};

}  // namespace tuned
