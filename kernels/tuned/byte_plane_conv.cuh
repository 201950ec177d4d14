// Stage tuned: the convolution that the image itself goes into, as byte_conv.cuh, by products of FP16 planes
// (planes.cuh), followed by maxima of 2 x 2. A byte is exact in FP16 and has no rest, so that two products do.
//
// The image is words of a pixel and the one behind it, as the step lays it: two neighbours are what a lane has of a row
// of pixels along a line of the kernel, and also of a column of them at two neighbouring positions. So a lane loads the
// words of its own windows, and no rows are made. A window sees KERNEL + 1 lines. Two of them, side by side in registers,
// are the left side of a product for both of the window's lines of positions, which meet other lines of the kernel there:
// what is held once is used twice.
//   forward           (positions, terms) x (terms, maps): the four positions of a window are the four rows of two tiles
//                     that a lane has, so that it takes their largest from its own registers.
//   backward_weights  (terms, positions) x (positions, maps): a lane makes the errors of a window's positions of the
//                     window's one error and its winner. They are never stored.
// Errors are scaled by a power of two, of each image's, warp's and eight maps' own.
//
// conv_common.cuh says what Layer has for ConvSums; besides, GRADIENT_PITCH: floats from a term's gradient to the next
// one's in Staged; RawWeights, where weights arrive before they are split; and LEAVES_PLANES: Target is planes of FP16, as
// plane_conv.cuh has its source. Then the winner says too whether the slope is 0: backward does not know the values.
#pragma once
#include "../planes.cuh"
#include "byte_conv.cuh"

namespace tuned {

template <class Layer, class Threads>
struct BytePlaneConv : ConvSums<Layer, Threads> {
  using Sums = ConvSums<Layer, Threads>;
  using Sums::BLOCK, Sums::CHANNELS, Sums::FUNCTION, Sums::HEIGHT, Sums::KERNEL, Sums::MAPS, Sums::OUT_AREA,
      Sums::OUT_COLUMNS, Sums::PARAMETERS, Sums::TEAMS, Sums::TERMS, Sums::lane, Sums::warp, Sums::WARPS, Sums::WIDTH;
  using Raw = RawBytes<CHANNELS, KERNEL, MAPS>;
  using Number = unsigned short;  // an FP16
  static constexpr int GRADIENT_PITCH = Layer::GRADIENT_PITCH;
  static_assert(Layer::STRIDE == 1 && KERNEL <= 8, "a line of the kernel is neighbouring pixels of a row");
  static_assert(Layer::WINDOW == 2 && Layer::METHOD == MAX, "a lane has the four positions of a window");
  static_assert(!exists<typename Layer::SourceErrors>, "the image's errors are needed by nothing");

  // Pairs of the lines that a window sees, of each channel and of all. The left side of a product is one of them.
  static constexpr int PAIRS = KERNEL / 2 + 1, LEFTS = CHANNELS * PAIRS;
  // Weights (maps, channels, lines of the kernel, 8), with a line of zeros before them and enough behind them: line `row`
  // of positions meets line i of the kernel at line i + row of the window.
  static constexpr int LINES = 2 * PAIRS + 1, N_TILES = ceil_div(MAPS, 8);
  static constexpr int WEIGHT_PITCH = (CHANNELS * LINES | 1) * 8, WEIGHT_PLANE = N_TILES * 8 * WEIGHT_PITCH;
  // The gradient, in tiles of two lines of the kernel: every warp has sums of its own, over a share of the windows.
  static constexpr int OF_CHANNEL = ceil_div(KERNEL, 2), TILES_OF_TERMS = CHANNELS * OF_CHANNEL;
  static constexpr int STAGED_SHARE = (TILES_OF_TERMS * 16 + 1) * GRADIENT_PITCH;
  static_assert(GRADIENT_PITCH >= N_TILES * 8, "a term's gradient has a place for each map");
  static_assert(Layer::STAGED_FLOATS >= TEAMS * WARPS * STAGED_SHARE, "every warp's gradient has a place in Staged");
  // A winner is the number of bits by which it lies behind the window's first position, 16 each.
  static constexpr int PLACE = 16, NO_PLACE = 4 * PLACE;  // NO_PLACE: the slope is 0
  static constexpr bool LEAVES_PLANES = Layer::LEAVES_PLANES;
  static_assert(!LEAVES_PLANES || FUNCTION == RELU || FUNCTION == IDENTITY, "slopes are 0 or 1");
  static constexpr int TARGET_PIXEL = (N_TILES | 1) * 8, TARGET_PLANE = OUT_AREA * TARGET_PIXEL;

  // Whether a line of a window's positions meets any line of the kernel at a pair of lines.
  static __host__ __device__ constexpr bool meets(int pair, int row) { return 2 * pair - row < KERNEL; }

  // Weights: planes (2, maps, WEIGHT_PITCH), then what is added to the sums (MAPS,) in floats.
  static constexpr bool COPIES = true;
  template <class Context>
  static __device__ __forceinline__ void copy_weights(Context& c) {
    Sums::copy_parameters(c, Layer::RawWeights::all(c.shared));
  }
  template <class Context>
  static __device__ __forceinline__ void convert_weights(Context& c) {
    const float* raw = Layer::RawWeights::all(c.shared);
    float* const weights = Layer::Weights::all(c.shared);
    constexpr int WORDS = CHANNELS * LINES * 4;
#pragma unroll 1
    for (int i = threadIdx.x; i < N_TILES * 8 * WORDS; i += BLOCK) {
      const int map = i / WORDS, word = i % WORDS, channel = word / (LINES * 4), column = word % 4 * 2;
      const int line = word / 4 % LINES - 1;
      const float scale = CHANNELS > 1 ? Raw::scale_of(c, channel) : 1.0f;
      const auto weight = [&](int j) {
        const bool any = map < MAPS && line >= 0 && line < KERNEL && j < KERNEL;
        return any ? raw[map * TERMS + (channel * KERNEL + line) * KERNEL + j] * scale : 0.0f;
      };
      unsigned whole, rest;
      split_fp16(weight(column), weight(column + 1), whole, rest);
      unsigned* const words = reinterpret_cast<unsigned*>(weights) + map * WEIGHT_PITCH / 2 + word;
      words[0] = whole;
      words[WEIGHT_PLANE / 2] = rest;
    }
    // by the last threads, which have less to do above
    for (int map = BLOCK - 1 - threadIdx.x; map < MAPS; map += BLOCK)
      weights[WEIGHT_PLANE + map] = Raw::bias(c, raw, map);
  }

  // The first pixel that a window sees.
  static __device__ __forceinline__ const unsigned* corner_of(const float* image, int window) {
    const int known = min(window, OUT_AREA - 1);
    return reinterpret_cast<const unsigned*>(image) + (known / OUT_COLUMNS * WIDTH + known % OUT_COLUMNS) * 2;
  }
  // Where a line of a pair begins, from the first pixel that a window sees; if it is one too many, the last one.
  static __host__ __device__ constexpr int line_at(int left, int lower) {
    return (left / PAIRS * HEIGHT + smaller_of(left % PAIRS * 2 + lower, KERNEL)) * WIDTH;
  }

  template <class Context>
  static __device__ __forceinline__ void forward(Context& c, int slot) {
    float* const shared = c.shared;
    float* const weights = Layer::Weights::all(shared);
    const float scale = 1.0f / Raw::deviation_of(c, 0);
    ROLLED_FOR(int map0 = 0; map0 < N_TILES * 8; map0 += 8)
      add_up(Layer::Source::image(shared, slot), reinterpret_cast<const Number*>(weights), weights + WEIGHT_PLANE,
             scale, map0, Layer::Target::image(shared, slot), Sums::winners_of(shared, slot));
  }

  // target (TARGET_SIZE,), or its planes, and its winners, of eight maps. bias (MAPS,) is added to the sums times `scale`.
  static __device__ __forceinline__ void add_up(const float* image, const Number* weights, const float* bias,
                                                float scale, int map0, float* target, unsigned char* winners) {
    unsigned right[2][LEFTS][4];  // for both lines of positions
    UNROLL_FOR(int row = 0; row < 2; row++)
      UNROLL_FOR(int k = 0; k < LEFTS; k++)
        load_matrices(right[row][k], weights + (map0 + lane() % 8) * WEIGHT_PITCH + lane() / 16 * WEIGHT_PLANE +
                                         (k / PAIRS * LINES + k % PAIRS * 2 + lane() / 8 % 2 + 1 - row) * 8);
    float added[2];
    UNROLL_FOR(int odd = 0; odd < 2; odd++) added[odd] = bias[min(map0 + lane() % 4 * 2 + odd, MAPS - 1)];
    // two eights of windows at a time, so that fewer products wait for each other
    constexpr int EIGHTS = ceil_div(OUT_AREA, 8), TWICE = EIGHTS / (2 * WARPS);
    ROLLED_FOR(int n = 0; n < TWICE; n++)
      windows<2>(image, right, added, scale, map0, target, winners, 2 * n * WARPS + warp());
    for (int eight = 2 * TWICE * WARPS + warp(); eight < EIGHTS; eight += WARPS)
      windows<1>(image, right, added, scale, map0, target, winners, eight);
  }

  // Two neighbouring words, of a line that has an even number of them.
  struct alignas(8) Neighbours {
    unsigned word[2];
  };

  // The windows of N eights: `first`, and those WARPS apart from it.
  template <int N>
  static __device__ __forceinline__ void windows(const float* image, const unsigned (&right)[2][LEFTS][4],
                                                 const float (&added)[2], float scale, int map0, float* target,
                                                 unsigned char* winners, int first) {
    // Lanes whose columns have no weights load the last ones that have some.
    const int column = min(lane() % 4 * 2, (KERNEL - 1) / 2 * 2);
    unsigned left[N][LEFTS][4];
    PlaneSum sum[N][2];
    UNROLL_FOR(int i = 0; i < N; i++) {
      const unsigned* corner = corner_of(image, (first + i * WARPS) * 8 + lane() / 4) + column;
      UNROLL_FOR(int k = 0; k < LEFTS; k++)
        UNROLL_FOR(int lower = 0; lower < 2; lower++) {
          const unsigned* at = corner + line_at(k, lower);
          if constexpr (WIDTH % 2 == 0) {
            const Neighbours both = *reinterpret_cast<const Neighbours*>(at);
            left[i][k][2 * lower] = both.word[0], left[i][k][2 * lower + 1] = both.word[1];
          } else {
            left[i][k][2 * lower] = at[0], left[i][k][2 * lower + 1] = at[1];
          }
        }
      UNROLL_FOR(int row = 0; row < 2; row++) sum[i][row].clear();
    }
    UNROLL_FOR(int k = 0; k < LEFTS; k++)
      UNROLL_FOR(int is_whole = 0; is_whole < 2; is_whole++)
        UNROLL_FOR(int row = 0; row < 2; row++) {
          if (!meets(k % PAIRS, row)) continue;
          const unsigned part[2] = {right[row][k][is_whole ? 0 : 2], right[row][k][is_whole ? 1 : 3]};
          UNROLL_FOR(int i = 0; i < N; i++) mma_fp16(is_whole ? sum[i][row].whole : sum[i][row].rest, left[i][k], part);
        }
    UNROLL_FOR(int i = 0; i < N; i++) {
      const int window = (first + i * WARPS) * 8 + lane() / 4;
      float results[2];
      UNROLL_FOR(int odd = 0; odd < 2; odd++) {
        const int map = map0 + lane() % 4 * 2 + odd;
        float value[2][2];
        UNROLL_FOR(int at = 0; at < 4; at++) value[at / 2][at % 2] = sum[i][at / 2].at(odd + at % 2 * 2);
        int winner;
        const float largest = largest_of_window<PLACE>(value, winner);
        const float result = activate<FUNCTION>(fmaf(largest, scale, added[odd]));
        const bool map_exists = MAPS % 8 == 0 || map < MAPS;
        if (LEAVES_PLANES && slope<FUNCTION>(result) == 0.0f) winner = NO_PLACE;
        results[odd] = map_exists ? result : 0.0f;
        if (map_exists && (OUT_AREA % 8 == 0 || window < OUT_AREA)) {
          if (!LEAVES_PLANES) target[map * OUT_AREA + window] = result;
          winners[map * OUT_AREA + window] = (unsigned char)winner;
        }
      }
      if (LEAVES_PLANES && (OUT_AREA % 8 == 0 || window < OUT_AREA)) {
        unsigned* const words = reinterpret_cast<unsigned*>(target) + (window * TARGET_PIXEL + map0) / 2 + lane() % 4;
        split_fp16(results[0], results[1], words[0], words[TARGET_PLANE / 2]);
      }
    }
  }

  // A warp's sums over its windows: tiles of (terms of two lines of the kernel, maps), and of errors.
  struct Accumulators {
    Fragment tile[TILES_OF_TERMS][N_TILES];
    float errors[N_TILES];
  };
  static __device__ __forceinline__ void clear(Accumulators& sums) {
    ::clear(sums.tile);
    UNROLL_FOR(int n = 0; n < N_TILES; n++) sums.errors[n] = 0.0f;
  }

  template <class Context>
  static __device__ __forceinline__ void backward(Context& c, int slot, Accumulators& sums) {
    float* const shared = c.shared;
    UNROLL_FOR(int n = 0; n < N_TILES; n++)
      backward_weights(Layer::Source::image(shared, slot), Layer::Target::image(shared, slot),
                       Sums::winners_of(shared, slot), Layer::TargetErrors::image(shared, slot), n, sums);
  }

  // How many neighbouring windows of a map a lane takes together. A step's terms are one line of positions of two of
  // them, of four lanes; a group is the windows of four lanes. The groups that are left when each warp has the same number
  // of them are divided among SHARE warps each, by steps.
  static constexpr bool BY_FOURS = OUT_COLUMNS % 4 == 0;
  static constexpr int TOGETHER = BY_FOURS ? 4 : 2, STEPS = TOGETHER, GROUPS = ceil_div(OUT_AREA, 4 * TOGETHER);
  static constexpr int ROUNDS = GROUPS / WARPS, LEFT = GROUPS % WARPS;
  static constexpr int SHARE = LEFT == 0 || WARPS / LEFT < 1 ? 1 : smaller_of(WARPS / LEFT, STEPS);

  // A lane's windows of a group, of one map.
  static __device__ __forceinline__ int first_window(int group) { return (group * 4 + lane() % 4) * TOGETHER; }
  static __device__ __forceinline__ int map_of(int n) { return n * 8 + lane() / 4; }
  static __device__ __forceinline__ int place_of(int window, int n) {
    return min(map_of(n), MAPS - 1) * OUT_AREA + min(window, OUT_AREA - (BY_FOURS ? 4 : 1));
  }
  static __device__ __forceinline__ void load(const float* numbers, int group, int n, float (&values)[TOGETHER]) {
    if constexpr (BY_FOURS) {
      const Float4 four = *reinterpret_cast<const Float4*>(numbers + place_of(first_window(group), n));
      UNROLL_FOR(int i = 0; i < TOGETHER; i++) values[i] = four.at[i];
    } else {
      UNROLL_FOR(int i = 0; i < TOGETHER; i++) values[i] = numbers[place_of(first_window(group) + i, n)];
    }
  }

  // A line of positions meets two lines of the kernel at a pair of lines.
  using Found = PlaneSum[2][LEFTS];

  // sums += this image's share, of eight maps.
  static __device__ __forceinline__ void backward_weights(const float* image, const float* target,
                                                          const unsigned char* winners, const float* target_errors,
                                                          int n, Accumulators& sums) {
    unsigned largest = 0;
    const auto look = [&](int group) {
      float error[TOGETHER];
      load(target_errors, group, n, error);
      UNROLL_FOR(int i = 0; i < TOGETHER; i++) largest = max(largest, bits_of_size(error[i]));
    };
    const bool takes_left = LEFT > 0 && warp() < LEFT * SHARE;
    const int left = ROUNDS * WARPS + warp() % max(1, LEFT), part = warp() / max(1, LEFT);
    for (int round = 0; round < ROUNDS; round++) look(round * WARPS + warp());
    if (takes_left) look(left);
    const float scale = scale_of(largest);
    Found sum;
    UNROLL_FOR(int row = 0; row < 2; row++)
      UNROLL_FOR(int k = 0; k < LEFTS; k++) sum[row][k].clear();
    for (int round = 0; round < ROUNDS; round++)
      add_group<1>(image, target, winners, target_errors, scale, n, round * WARPS + warp(), 0, sum, sums.errors[n]);
    if (takes_left) add_group<SHARE>(image, target, winners, target_errors, scale, n, left, part, sum, sums.errors[n]);
    const float inverse = unscale(scale);
    UNROLL_FOR(int m = 0; m < TILES_OF_TERMS; m++)
      UNROLL_FOR(int i = 0; i < 4; i++) {
        // line 2 k + i / 2 of the kernel: with the second line of positions it is one line of the window further
        const int k = m / OF_CHANNEL * PAIRS + m % OF_CHANNEL, lower = i / 2;
        if (m % OF_CHANNEL * 2 + lower >= KERNEL) continue;
        float& total = sums.tile[m][n].at[i];
        total = fmaf(sum[0][k].at(i) + sum[1][k + lower].at(i ^ 2), inverse, total);
      }
  }

  // sum += the products of a group's steps `part`, `part` + SHARES, ...; errors += its windows' errors.
  template <int SHARES>
  static __device__ __forceinline__ void add_group(const float* image, const float* target,
                                                   const unsigned char* winners, const float* target_errors,
                                                   float scale, int n, int group, int part, Found& sum, float& errors) {
    const int window = first_window(group);
    float error[TOGETHER], value[TOGETHER];
    load(target_errors, group, n, error);
    if constexpr (!LEAVES_PLANES) load(target, group, n, value);
    unsigned place[TOGETHER];
    if constexpr (BY_FOURS) {
      const unsigned four = *reinterpret_cast<const unsigned*>(winners + place_of(window, n));
      UNROLL_FOR(int i = 0; i < TOGETHER; i++) place[i] = four >> 8 * i & 255u;
    } else {
      UNROLL_FOR(int i = 0; i < TOGETHER; i++) place[i] = winners[place_of(window + i, n)];
    }
    const bool map_exists = MAPS % 8 == 0 || map_of(n) < MAPS;
    UNROLL_FOR(int i = 0; i < TOGETHER; i++) {
      const bool there = map_exists && (OUT_AREA % (4 * TOGETHER) == 0 || window + i < OUT_AREA);
      if constexpr (LEAVES_PLANES)
        error[i] = there && place[i] != NO_PLACE ? error[i] : 0.0f;
      else
        error[i] = there ? error[i] * slope<FUNCTION>(value[i]) : 0.0f;
    }
    // Lanes of columns without weights, whose sums nothing asks for, load the last ones that have some.
    const int column = min(lane() / 4, KERNEL - 1);
    const unsigned* const corner = corner_of(image, BY_FOURS ? min(window, OUT_AREA - 4) : window) + column;
    UNROLL_FOR(int two = 0; two < TOGETHER; two += 2) {
      const auto is_own = [&](int row) { return SHARES == 1 || (two + row) % SHARES == part; };
      if (SHARES > 2 && !is_own(0) && !is_own(1)) continue;
      unsigned left[LEFTS][4], whole[2], rest[2];
      UNROLL_FOR(int i = 0; i < 2; i++) {
        const unsigned* at = BY_FOURS ? corner + 2 * (two + i) : corner_of(image, window + two + i) + column;
        UNROLL_FOR(int k = 0; k < LEFTS; k++)
          UNROLL_FOR(int lower = 0; lower < 2; lower++) left[k][2 * i + lower] = at[line_at(k, lower)];
        split_fp16(error[two + i] * scale, whole[i], rest[i]);
      }
      UNROLL_FOR(int row = 0; row < 2; row++) {
        if (!is_own(row)) continue;
        errors += error[two + row];
        // an error at its winner's position, and 0 at the others
        unsigned right[2], right_rest[2];
        UNROLL_FOR(int i = 0; i < 2; i++) {
          const unsigned bits = place[two + i] ^ row * 2 * PLACE;
          right[i] = shift_left(whole[i], bits), right_rest[i] = shift_left(rest[i], bits);
        }
        UNROLL_FOR(int k = 0; k < LEFTS; k++)
          if (meets(k % PAIRS, row)) mma_fp16(sum[row][k].rest, left[k], right_rest);
        UNROLL_FOR(int k = 0; k < LEFTS; k++)
          if (meets(k % PAIRS, row)) mma_fp16(sum[row][k].whole, left[k], right);
      }
    }
  }

  // Staged (TEAMS, WARPS, terms, GRADIENT_PITCH) = every warp's sums, with those of errors as the last term.
  template <class Context>
  static __device__ __forceinline__ void stage_gradient(Context& c, const Accumulators& sums) {
    float* const own = Layer::Staged::all(c.shared) + (Threads::team() * WARPS + warp()) * STAGED_SHARE;
    UNROLL_FOR(int n = 0; n < N_TILES; n++) {
      UNROLL_FOR(int m = 0; m < TILES_OF_TERMS; m++)
        UNROLL_FOR(int i = 0; i < 4; i++)
          own[(m * 16 + tile_row(i)) * GRADIENT_PITCH + n * 8 + tile_column(i)] = sums.tile[m][n].at[i];
      float errors = sums.errors[n];
      UNROLL_FOR(int bit = 1; bit < 4; bit *= 2) errors += __shfl_xor_sync(0xffffffffu, errors, bit);
      if (lane() % 4 == 0) own[TILES_OF_TERMS * 16 * GRADIENT_PITCH + n * 8 + lane() / 4] = errors;
    }
  }

  // Where a term lies in a share: a line of the kernel has eight rows.
  static __device__ __forceinline__ int row_of(int term) {
    const int line = term / KERNEL;
    return ((CHANNELS == 1 ? 0 : line / KERNEL * OF_CHANNEL * 2) + line % KERNEL) * 8 + term % KERNEL;
  }
  // The gradient of a map's term, all shares of it.
  static __device__ __forceinline__ float total_of(const float* staged, int term, int map) {
    float total = 0.0f;
    UNROLL_FOR(int share = 0; share < TEAMS * WARPS; share++)
      total += staged[share * STAGED_SHARE + term * GRADIENT_PITCH + map];
    return total;
  }

  // The layer's partial sums = weight gradient (MAPS, TERMS), then bias gradient. After stage_gradient and a barrier.
  template <class Context, class Row>
  static __device__ __forceinline__ void store_gradient(Context& c, Row partials) {
    const Row partial = partials + Layer::FIRST_PARTIAL;
    const float* const staged = Layer::Staged::all(c.shared);
    for (int i = threadIdx.x; i < PARAMETERS; i += BLOCK) {
      const bool weight = i < MAPS * TERMS;
      const int map = weight ? i / TERMS : i - MAPS * TERMS, term = weight ? i % TERMS : 0;
      const float errors = total_of(staged, TILES_OF_TERMS * 16, map);
      partial[i] = weight ? Raw::gradient(c, total_of(staged, row_of(term), map), errors, term) : errors;
    }
  }
};

}  // namespace tuned
