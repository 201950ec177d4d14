// Stage tuned: the convolution that the image itself goes into, with stride 1; otherwise as conv.cuh. The image stays
// bytes, which BF16 holds exactly, and the sums are normalised instead of it:
//   sum of weight (byte - mean) / deviation = (sum of weight byte - mean sum of weight) / deviation,
// and so for the gradient, where deltas are in the weights' place. Where channels have deviations of their own, each
// one's weights are scaled by that of the first channel over its own, so that one division serves all sums.
// Source is words: each pixel and the one behind it as two BF16, so that any two neighbours are one load.
// A border of zeros around the image is zeros of normalised numbers, and of bytes as they lie there. So where a window
// reaches into it, the weights' sum above is that of its weights within the image alone: it depends on how far beyond
// which sides, which makes a few biases of each map. And of the gradient, the sum of deltas is that of the positions at
// which the weight meets the image: a term for each place of the kernel, whose numbers are those of Inside.
// Layer has what conv_common.cuh says and: WEIGHT_PITCH (words from a map's weights to the next one's), RawWeights
// (where the parameters arrive as they are), BORDER_ROWS and BORDER_COLUMNS (they are part of HEIGHT and WIDTH), Inside
// (words like those of the source, of pixels that are 1 within the image and 0 in its border; or NoBuffer).
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

  // What is added to a map's sums after that division, where windows reach `above`, `below`, `left` and `right` rows
  // and columns beyond the image. raw: weights (MAPS, TERMS), then bias (MAPS,).
  template <class Context>
  static __device__ __forceinline__ float bias(const Context& c, const float* raw, int map, int above, int below,
                                               int left, int right) {
    float added = raw[MAPS * TERMS + map];
#pragma unroll 1
    for (int channel = 0; channel < CHANNELS; channel++) {
      float sum = 0.0f;
#pragma unroll 1
      for (int row = above; row < KERNEL - below; row++)
        UNROLL_FOR(int column = 0; column < KERNEL; column++)
          if (column >= left && column < KERNEL - right)
            sum += raw[map * TERMS + channel * AREA + row * KERNEL + column];
      added -= mean_of(c, channel) / deviation_of(c, channel) * sum;
    }
    return added;
  }
  template <class Context>
  static __device__ __forceinline__ float bias(const Context& c, const float* raw, int map) {
    float added = raw[MAPS * TERMS + map];
#pragma unroll 1
    for (int channel = 0; channel < CHANNELS; channel++) {
      float sum = 0.0f;
#pragma unroll(AREA <= 32 ? AREA : 5)
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
      Common::FULL_PITCH, Common::GRADIENT_TERMS, Common::HEIGHT, Common::KERNEL, Common::MAPS, Common::N_TILES,
      Common::own_split, Common::PARAMETERS, Common::POSITION_TILES, Common::ROWS, Common::TERMS, Common::thread_rank,
      Common::WARPS, Common::WEIGHTS_SPLIT_K, Common::WIDTH;
  using typename Common::Accumulators;
  using Raw = RawBytes<CHANNELS, KERNEL, MAPS>;
  static constexpr int AREA_OF_KERNEL = Raw::AREA;

  // Pairs of neighbours along a row: of weights forward, of positions for the gradient. A row's last may be half empty.
  static constexpr int WEIGHT_PAIRS = ceil_div(KERNEL, 2), TERM_PAIRS = CHANNELS * KERNEL * WEIGHT_PAIRS;
  static constexpr int COLUMN_PAIRS = ceil_div(COLUMNS, 2), AREA_PAIRS = ROWS * COLUMN_PAIRS;
  static constexpr int K_TILES = ceil_div(TERM_PAIRS, 8), POSITION_K_TILES = ceil_div(AREA_PAIRS, 8);
  static constexpr int WEIGHT_PITCH = Layer::WEIGHT_PITCH;
  static constexpr int BORDER_ROWS = Layer::BORDER_ROWS, BORDER_COLUMNS = Layer::BORDER_COLUMNS;
  static constexpr bool BORDERED = BORDER_ROWS > 0 || BORDER_COLUMNS > 0;
  static_assert(Split::K == 16, "tiles of eight pairs");
  static_assert(Layer::STRIDE == 1 && Layer::FORWARD_SPLIT_K == 1, "there are few terms");
  static_assert(exists<typename Layer::Inside> == BORDERED, "a border has a table of what lies within it");
  static_assert(GRADIENT_TERMS == TERMS + 1 + (BORDERED ? AREA_OF_KERNEL : 0), "each place of the kernel is a term");
  static_assert(!BORDERED || (ROWS >= 2 * BORDER_ROWS && COLUMNS >= 2 * BORDER_COLUMNS),
                "no window reaches beyond two opposite sides");
  static_assert(WEIGHT_PITCH >= K_TILES * 8, "tiles of weights lie within a map's");
  static_assert(!exists<typename Layer::SourceErrors>, "the image's errors are needed by nothing");

  // What is added to the sums: of each map, (2 BORDER_ROWS + 1, 2 BORDER_COLUMNS + 1) numbers, the middle one where
  // windows lie within the image, and those before and behind it where they reach beyond an edge.
  struct Biases {
    static constexpr int ACROSS = 2 * BORDER_COLUMNS + 1, OF_A_MAP = (2 * BORDER_ROWS + 1) * ACROSS;
    static constexpr bool OF_MAP = !BORDERED;
    static __device__ __forceinline__ int kind_of(int position, int positions, int border) {
      return min(position, border) + max(0, position - (positions - 1 - border));
    }
    static __device__ __forceinline__ int index(int map, int row, int column) {
      if (OF_MAP) return map;
      return map * OF_A_MAP + kind_of(row, ROWS, BORDER_ROWS) * ACROSS + kind_of(column, COLUMNS, BORDER_COLUMNS);
    }
    template <class Context>
    static __device__ __forceinline__ float make(const Context& c, const float* raw, int i) {
      if (OF_MAP) return Raw::bias(c, raw, i);
      const int beyond_rows = i % OF_A_MAP / ACROSS - BORDER_ROWS, beyond_columns = i % ACROSS - BORDER_COLUMNS;
      return Raw::bias(c, raw, i / OF_A_MAP, max(0, -beyond_rows), max(0, beyond_rows), max(0, -beyond_columns),
                       max(0, beyond_columns));
    }
  };

  // Inside (HEIGHT, WIDTH): words.
  static __device__ __forceinline__ void prepare(float* shared) {
    if constexpr (BORDERED) {
      const auto inside = [](int at) -> unsigned {
        const int row = at / WIDTH - BORDER_ROWS, column = at % WIDTH - BORDER_COLUMNS;
        return row >= 0 && row < HEIGHT - 2 * BORDER_ROWS && column >= 0 && column < WIDTH - 2 * BORDER_COLUMNS;
      };
      unsigned* words = reinterpret_cast<unsigned*>(Layer::Inside::all(shared));
      for (int i = threadIdx.x; i < HEIGHT * WIDTH; i += BLOCK)
        words[i] = inside(i) * (TWO_ONES & 0xffff) | inside(i + 1) * (TWO_ONES & 0xffff0000);
    }
  }

  // Weights (as words, (3, MAPS, WEIGHT_PITCH), then what is added to the sums) are made of the raw parameters.
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
    for (int i = BLOCK - 1 - threadIdx.x; i < MAPS * Biases::OF_A_MAP; i += BLOCK)
      weights[3 * MAPS * WEIGHT_PITCH + i] = Biases::make(c, raw, i);
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
    Common::template finish<Biases>(weights + 3 * MAPS * WEIGHT_PITCH, target, winners, full, scratch,
                                    1.0f / deviation);
  }

  template <class Context>
  static __device__ __forceinline__ void backward(Context& c, int slot, Accumulators& sums) {
    float* const shared = c.shared;
    float* const full = Layer::Full::image(shared, slot);
    Common::unpool(Layer::Target::image(shared, slot), Common::winners_of(shared, slot),
                   Layer::TargetErrors::image(shared, slot), full);
    Threads::template team_barrier<ByteConv>();
    const float* inside = nullptr;
    if constexpr (BORDERED) inside = Layer::Inside::all(shared);
    backward_weights(Layer::Source::image(shared, slot), inside, full, sums);
  }

  // sums += this image's share: deltas x bytes; as the next term, deltas; and with a border, deltas x Inside.
  static __device__ __forceinline__ void backward_weights(const float* image, const float* inside, const float* full,
                                                          Accumulators& sums) {
    const int split = own_split(), term0 = first_term();
    if (split >= WEIGHTS_SPLIT_K) return;
    const unsigned *pixels = reinterpret_cast<const unsigned*>(image),
                   *places = reinterpret_cast<const unsigned*>(inside);
#pragma unroll 2
    for (int k = split; k < POSITION_K_TILES; k += WEIGHTS_SPLIT_K)
      Split::multiply(
          sums.tile,
          [&](int m, int row, int pair) {
            const int term = term0 + m * 16 + row;
            const bool of_border = BORDERED && term > TERMS;
            const int known = of_border ? min(term - TERMS - 1, AREA_OF_KERNEL - 1) : min(term, TERMS - 1);
            const int at = min(k * 8 + pair, AREA_PAIRS - 1);
            const unsigned two =
                (of_border ? places : pixels)[(known / (KERNEL * KERNEL) * HEIGHT + known / KERNEL % KERNEL) * WIDTH +
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
  template <class Context, class Row>
  static __device__ __forceinline__ void store_gradient(Context& c, Row partials) {
    const Row partial = partials + Layer::FIRST_PARTIAL;
    const float* scratch = Layer::Staged::all(c.shared);
    for (int i = threadIdx.x; i < PARAMETERS; i += BLOCK) {
      const int map = i < MAPS * TERMS ? i / TERMS : i - MAPS * TERMS;
      const bool of_weight = i < MAPS * TERMS;
      const float deltas = Common::total_of(scratch, map, TERMS + (BORDERED && of_weight ? 1 + i % AREA_OF_KERNEL : 0));
      partial[i] = of_weight ? Raw::gradient(c, Common::total_of(scratch, map, i % TERMS), deltas, i % TERMS) : deltas;
    }
  }
};

}  // namespace tuned
