// Stage tuned: the convolution that the image itself goes into, as byte_conv.cuh, by products of FP16 planes
// (planes.cuh), followed by maxima of 2 x 2. A byte is exact in FP16 and has no rest, so that two products do.
//
// A row of a product is the eight pixels from any pixel of a line on, of which a line of the kernel takes KERNEL; rows
// are made of the image before each pass. A unit is a line of the kernel in one channel.
//   forward           (positions, terms) x (terms, maps): the four positions of a window are the four rows of two tiles
//                     that a lane has, so that it takes their largest from its own registers.
//   backward_weights  (terms, positions) x (positions, maps): a lane makes the errors of the four positions of a window
//                     that its word of the right side stands for, of the window's error and winner. They are never
//                     stored.
// Errors are scaled by a power of two, of each image's and warp's own.
//
// conv_common.cuh says what Layer has for ConvSums; besides, GRADIENT_PITCH: floats from a term's gradient to the next
// one's in Staged; and RawWeights, where weights arrive before they are split.
#pragma once
#include "../planes.cuh"
#include "byte_conv.cuh"

namespace tuned {

template <class Layer, class Threads>
struct BytePlaneConv : ConvSums<Layer, Threads> {
  using Sums = ConvSums<Layer, Threads>;
  using Sums::BLOCK, Sums::CHANNELS, Sums::COLUMNS, Sums::FUNCTION, Sums::HEIGHT, Sums::KERNEL, Sums::MAPS,
      Sums::OUT_AREA, Sums::OUT_COLUMNS, Sums::PARAMETERS, Sums::TEAM, Sums::TEAMS, Sums::TERMS, Sums::lane,
      Sums::thread_rank, Sums::warp, Sums::WARPS, Sums::WIDTH;
  using Raw = RawBytes<CHANNELS, KERNEL, MAPS>;
  using Number = unsigned short;  // an FP16
  static constexpr int GRADIENT_PITCH = Layer::GRADIENT_PITCH;
  static_assert(Layer::STRIDE == 1 && KERNEL <= 8, "a line of the kernel is neighbouring pixels of a row");
  static_assert(Layer::WINDOW == 2 && Layer::METHOD == MAX, "a lane has the four positions of a window");
  static_assert(!exists<typename Layer::SourceErrors>, "the image's errors are needed by nothing");

  // Rows (CHANNELS, HEIGHT, LINE_PITCH, 8): those that some position's line begins with. BY_FOURS: the windows of a line
  // are whole fours, and the rows of two leave out two places behind every eight, so that the rows of windows four apart
  // lie in different banks too.
  static constexpr bool BY_FOURS = OUT_COLUMNS % 4 == 0;
  static constexpr int LINES = CHANNELS * HEIGHT, LINE_PITCH = Layer::LINE_PITCH;
  static_assert(LINE_PITCH >= COLUMNS + (BY_FOURS ? (COLUMNS - 1) / 8 * 2 : 0), "a line's rows lie behind each other");
  static_assert(Layer::SCRATCH_FLOATS >= LINES * LINE_PITCH * 4, "rows lie in Scratch");
  // Weights (maps, units, 8), with a last unit of zeros where they are odd.
  static constexpr int UNITS = CHANNELS * KERNEL, UNIT_PAIRS = ceil_div(UNITS, 2), N_TILES = ceil_div(MAPS, 8);
  static constexpr int WEIGHT_PITCH = (2 * UNIT_PAIRS + 1) * 8, WEIGHT_PLANE = N_TILES * 8 * WEIGHT_PITCH;
  // The gradient: every warp has sums of its own, over a share of the windows.
  static constexpr int STAGED_SHARE = (UNIT_PAIRS * 16 + 1) * GRADIENT_PITCH;
  static_assert(GRADIENT_PITCH >= N_TILES * 8, "a term's gradient has a place for each map");
  static_assert(Layer::STAGED_FLOATS >= TEAMS * WARPS * STAGED_SHARE, "every warp's gradient has a place in Staged");

  struct Laid;
  struct LaidAgain;

  static __device__ __forceinline__ int place_in_line(int column) {
    return BY_FOURS ? column + column / 8 * 2 : column;
  }

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
#pragma unroll 1
    for (int i = threadIdx.x; i < N_TILES * 8 * 2 * UNIT_PAIRS * 4; i += BLOCK) {
      const int map = i / (8 * UNIT_PAIRS), pair = i % (8 * UNIT_PAIRS), unit = pair / 4, column = pair % 4 * 2;
      const float scale = CHANNELS > 1 ? Raw::scale_of(c, min(unit / KERNEL, CHANNELS - 1)) : 1.0f;
      const auto weight = [&](int j) {
        return map < MAPS && unit < UNITS && j < KERNEL ? raw[map * TERMS + unit * KERNEL + j] * scale : 0.0f;
      };
      unsigned whole, rest;
      split_fp16(weight(column), weight(column + 1), whole, rest);
      unsigned* const words = reinterpret_cast<unsigned*>(weights) + map * WEIGHT_PITCH / 2 + pair;
      words[0] = whole;
      words[WEIGHT_PLANE / 2] = rest;
    }
    // by the last threads, which have less to do above
    for (int map = BLOCK - 1 - threadIdx.x; map < MAPS; map += BLOCK)
      weights[WEIGHT_PLANE + map] = Raw::bias(c, raw, map);
  }

  // rows = the eight pixels from each on; beyond KERNEL they meet weights of 0.
  static __device__ __forceinline__ void lay_rows(const float* image, Number* rows) {
    const unsigned* pixels = reinterpret_cast<const unsigned*>(image);
    for (int i = thread_rank(); i < LINES * COLUMNS; i += TEAM) {
      const unsigned* first = pixels + i / COLUMNS * WIDTH + i % COLUMNS;
      const auto two = [&](int column) { return column < KERNEL ? first[column] : 0u; };
      *reinterpret_cast<uint4*>(rows + (i / COLUMNS * LINE_PITCH + place_in_line(i % COLUMNS)) * 8) =
          make_uint4(two(0), two(2), two(4), two(6));
    }
  }

  // The row of a position, whose window and place in it are given, for a unit.
  static __device__ __forceinline__ const Number* row_of(const Number* rows, int window, int a, int b) {
    const int known = min(window, OUT_AREA - 1);
    return rows + ((known / OUT_COLUMNS * 2 + a) * LINE_PITCH + place_in_line(known % OUT_COLUMNS * 2) + b) * 8;
  }
  static __device__ __forceinline__ int unit_offset(int unit) {
    const int known = min(unit, UNITS - 1);
    return (known / KERNEL * HEIGHT + known % KERNEL) * LINE_PITCH * 8;
  }

  template <class Context>
  static __device__ __forceinline__ void forward(Context& c, int slot) {
    float* const shared = c.shared;
    float* const weights = Layer::Weights::all(shared);
    Number* const rows = reinterpret_cast<Number*>(Layer::Scratch::image(shared, slot));
    lay_rows(Layer::Source::image(shared, slot), rows);
    Threads::template team_barrier<Laid>();
    add_up(rows, reinterpret_cast<const Number*>(weights), weights + WEIGHT_PLANE, 1.0f / Raw::deviation_of(c, 0),
           Layer::Target::image(shared, slot), Sums::winners_of(shared, slot));
  }

  // target (TARGET_SIZE,) and its winners. bias (MAPS,) is added to the sums times `scale`.
  static __device__ __forceinline__ void add_up(const Number* rows, const Number* weights, const float* bias,
                                                float scale, float* target, unsigned char* winners) {
    unsigned right[UNIT_PAIRS][N_TILES][4];
    UNROLL_FOR(int k = 0; k < UNIT_PAIRS; k++)
      UNROLL_FOR(int n = 0; n < N_TILES; n++)
        load_matrices(right[k][n], weights + (n * 8 + lane() % 8) * WEIGHT_PITCH + k * 16 + lane() / 8 % 2 * 8 +
                                       lane() / 16 * WEIGHT_PLANE);
    // two eights of windows at a time, so that fewer products wait for each other
    constexpr int EIGHTS = ceil_div(OUT_AREA, 8), TWICE = EIGHTS / (2 * WARPS);
    for (int n = 0; n < TWICE; n++) windows<2>(rows, right, bias, scale, target, winners, 2 * n * WARPS + warp());
    for (int eight = 2 * TWICE * WARPS + warp(); eight < EIGHTS; eight += WARPS)
      windows<1>(rows, right, bias, scale, target, winners, eight);
  }

  // The windows of N eights: `first`, and those WARPS apart from it.
  template <int N>
  static __device__ __forceinline__ void windows(const Number* rows, const unsigned (&right)[UNIT_PAIRS][N_TILES][4],
                                                 const float* bias, float scale, float* target, unsigned char* winners,
                                                 int first) {
    // Positions of the upper four windows are taken in the order 1, 0 of columns, so that rows lie in different banks.
    const int other = lane() % 8 / 4, swapped = lane() / 16;
    PlaneSum sum[N][2][N_TILES];
    const Number* position[N][2];
    UNROLL_FOR(int i = 0; i < N; i++)
      UNROLL_FOR(int a = 0; a < 2; a++) {
        position[i][a] = row_of(rows, (first + i * WARPS) * 8 + lane() % 8, a, lane() / 8 % 2 ^ other);
        UNROLL_FOR(int n = 0; n < N_TILES; n++) sum[i][a][n].clear();
      }
    UNROLL_FOR(int k = 0; k < UNIT_PAIRS; k++) {
      const int offset = lane() / 16 ? unit_offset(2 * k + 1) : unit_offset(2 * k);
      unsigned left[N][2][4];
      UNROLL_FOR(int i = 0; i < N; i++)
        UNROLL_FOR(int a = 0; a < 2; a++) load_matrices(left[i][a], position[i][a] + offset);
      UNROLL_FOR(int n = 0; n < N_TILES; n++) {
        const unsigned whole[2] = {right[k][n][0], right[k][n][1]}, rest[2] = {right[k][n][2], right[k][n][3]};
        UNROLL_FOR(int i = 0; i < N; i++)
          UNROLL_FOR(int a = 0; a < 2; a++) mma_fp16(sum[i][a][n].rest, left[i][a], rest);
        UNROLL_FOR(int i = 0; i < N; i++)
          UNROLL_FOR(int a = 0; a < 2; a++) mma_fp16(sum[i][a][n].whole, left[i][a], whole);
      }
    }
    UNROLL_FOR(int i = 0; i < N; i++) {
      const int window = (first + i * WARPS) * 8 + lane() / 4;
      UNROLL_FOR(int n = 0; n < N_TILES; n++)
        UNROLL_FOR(int odd = 0; odd < 2; odd++) {
          const int map = n * 8 + lane() % 4 * 2 + odd;
          float value[4];
          UNROLL_FOR(int a = 0; a < 2; a++) {
            const float one = sum[i][a][n].at(odd), two = sum[i][a][n].at(2 + odd);
            value[2 * a] = swapped ? two : one, value[2 * a + 1] = swapped ? one : two;
          }
          const float largest = max_or_nan(max_or_nan(value[0], value[1]), max_or_nan(value[2], value[3]));
          int winner = 3;
          UNROLL_FOR(int at = 2; at >= 0; at--)
            if (value[at] == largest) winner = at;
          if ((MAPS % 8 == 0 || map < MAPS) && (OUT_AREA % 8 == 0 || window < OUT_AREA)) {
            target[map * OUT_AREA + window] = activate<FUNCTION>(fmaf(largest, scale, bias[map]));
            winners[map * OUT_AREA + window] = (unsigned char)winner;
          }
        }
    }
  }

  // A warp's sums over its windows: tiles of (terms of two units, maps), and of errors.
  struct Accumulators {
    Fragment tile[UNIT_PAIRS][N_TILES];
    float errors[N_TILES];
  };
  static __device__ __forceinline__ void clear(Accumulators& sums) {
    ::clear(sums.tile);
    UNROLL_FOR(int n = 0; n < N_TILES; n++) sums.errors[n] = 0.0f;
  }

  template <class Context>
  static __device__ __forceinline__ void backward(Context& c, int slot, Accumulators& sums) {
    float* const shared = c.shared;
    Number* const rows = reinterpret_cast<Number*>(Layer::Scratch::image(shared, slot));
    lay_rows(Layer::Source::image(shared, slot), rows);
    Threads::template team_barrier<LaidAgain>();
    backward_weights(rows, Layer::Target::image(shared, slot), Sums::winners_of(shared, slot),
                     Layer::TargetErrors::image(shared, slot), sums);
  }

  // How many neighbouring windows of a map a lane takes together, one in each of so many steps of the products: a step's
  // terms are the positions of four windows, `FOUR` apart. The groups of FOUR steps that are left when each warp has
  // the same number of groups are divided among SHARE warps each.
  static constexpr int FOUR = BY_FOURS ? 4 : 1, GROUPS = ceil_div(OUT_AREA, 4 * FOUR);
  static constexpr int ROUNDS = GROUPS / WARPS, LEFT = GROUPS % WARPS;
  static constexpr int SHARE = LEFT == 0 || WARPS / LEFT < 1 ? 1 : WARPS / LEFT < FOUR ? WARPS / LEFT : FOUR;

  // Where a lane's map and first window of a group lie in the target.
  static __device__ __forceinline__ int place_of(int group, int n) {
    return min(n * 8 + lane() / 4, MAPS - 1) * OUT_AREA + min((group * 4 + lane() % 4) * FOUR, OUT_AREA - FOUR);
  }
  static __device__ __forceinline__ bool has_place(int group, int n) {
    return (MAPS % 8 == 0 || n * 8 + lane() / 4 < MAPS) &&
           (OUT_AREA % (4 * FOUR) == 0 || (group * 4 + lane() % 4) * FOUR < OUT_AREA);
  }
  // FOUR numbers from `at` on.
  static __device__ __forceinline__ void load_four(const float* at, float (&values)[FOUR]) {
    if constexpr (BY_FOURS) {
      const Float4 four = *reinterpret_cast<const Float4*>(at);
      UNROLL_FOR(int t = 0; t < FOUR; t++) values[t] = four.at[t];
    } else {
      values[0] = *at;
    }
  }

  // sums += this image's share.
  static __device__ __forceinline__ void backward_weights(const Number* rows, const float* target,
                                                          const unsigned char* winners, const float* target_errors,
                                                          Accumulators& sums) {
    unsigned largest = 0;
    const auto look = [&](int group) {
      UNROLL_FOR(int n = 0; n < N_TILES; n++) {
        float error[FOUR];
        load_four(target_errors + place_of(group, n), error);
        UNROLL_FOR(int t = 0; t < FOUR; t++) largest = max(largest, bits_of_size(error[t]));
      }
    };
    const bool takes_left = LEFT > 0 && warp() < LEFT * SHARE;
    const int left = ROUNDS * WARPS + warp() % max(1, LEFT), part = warp() / max(1, LEFT);
    for (int round = 0; round < ROUNDS; round++) look(round * WARPS + warp());
    if (takes_left) look(left);
    const float scale = scale_of(largest);
    PlaneSum sum[UNIT_PAIRS][N_TILES];
    UNROLL_FOR(int m = 0; m < UNIT_PAIRS; m++)
      UNROLL_FOR(int n = 0; n < N_TILES; n++) sum[m][n].clear();
    for (int round = 0; round < ROUNDS; round++)
      add_group<1>(rows, target, winners, target_errors, scale, round * WARPS + warp(), 0, sum, sums.errors);
    if (takes_left) add_group<SHARE>(rows, target, winners, target_errors, scale, left, part, sum, sums.errors);
    const float inverse = unscale(scale);
    UNROLL_FOR(int m = 0; m < UNIT_PAIRS; m++)
      UNROLL_FOR(int n = 0; n < N_TILES; n++)
        UNROLL_FOR(int i = 0; i < 4; i++) {
          float& total = sums.tile[m][n].at[i];
          total = fmaf(sum[m][n].at(i), inverse, total);
        }
  }

  // sum += the products of a group's steps `part`, `part` + SHARES, ...; errors += its windows' errors.
  template <int SHARES>
  static __device__ __forceinline__ void add_group(const Number* rows, const float* target,
                                                   const unsigned char* winners, const float* target_errors,
                                                   float scale, int group, int part,
                                                   PlaneSum (&sum)[UNIT_PAIRS][N_TILES], float (&errors)[N_TILES]) {
    const Number* position = row_of(rows, (group * 4 + lane() % 8 / 2) * FOUR, lane() / 16, lane() % 2);
    float error[N_TILES][FOUR];
    unsigned winner[N_TILES];
    UNROLL_FOR(int n = 0; n < N_TILES; n++) {
      const int at = place_of(group, n);
      float value[FOUR];
      load_four(target_errors + at, error[n]);
      load_four(target + at, value);
      if constexpr (BY_FOURS)
        winner[n] = *reinterpret_cast<const unsigned*>(winners + at);
      else
        winner[n] = winners[at];
      UNROLL_FOR(int t = 0; t < FOUR; t++)
        error[n][t] = has_place(group, n) ? error[n][t] * slope<FUNCTION>(value[t]) : 0.0f;
    }
    UNROLL_FOR(int t = 0; t < FOUR; t++) {
      if (SHARES > 1 && t % SHARES != part) continue;
      unsigned left[UNIT_PAIRS][4];
      UNROLL_FOR(int m = 0; m < UNIT_PAIRS; m++)
        load_matrices_transposed(left[m],
                                 position + 16 * t + (lane() / 8 % 2 ? unit_offset(2 * m + 1) : unit_offset(2 * m)));
      UNROLL_FOR(int n = 0; n < N_TILES; n++) {
        errors[n] += error[n][t];
        unsigned whole, rest;
        split_fp16(error[n][t] * scale, error[n][t] * scale, whole, rest);
        const unsigned own = winner[n] >> 8 * t & 3u, half = own % 2 ? 0xffff0000u : 0x0000ffffu;
        whole &= half, rest &= half;
        const unsigned right[2] = {own < 2 ? whole : 0u, own < 2 ? 0u : whole};
        const unsigned right_rest[2] = {own < 2 ? rest : 0u, own < 2 ? 0u : rest};
        UNROLL_FOR(int m = 0; m < UNIT_PAIRS; m++) mma_fp16(sum[m][n].rest, left[m], right_rest);
        UNROLL_FOR(int m = 0; m < UNIT_PAIRS; m++) mma_fp16(sum[m][n].whole, left[m], right);
      }
    }
  }

  // Staged (TEAMS, WARPS, terms, GRADIENT_PITCH) = every warp's sums, with those of errors as the last term.
  template <class Context>
  static __device__ __forceinline__ void stage_gradient(Context& c, const Accumulators& sums) {
    float* const own = Layer::Staged::all(c.shared) + (Threads::team() * WARPS + warp()) * STAGED_SHARE;
    UNROLL_FOR(int n = 0; n < N_TILES; n++) {
      UNROLL_FOR(int m = 0; m < UNIT_PAIRS; m++)
        UNROLL_FOR(int i = 0; i < 4; i++)
          own[(m * 16 + tile_row(i)) * GRADIENT_PITCH + n * 8 + tile_column(i)] = sums.tile[m][n].at[i];
      float errors = sums.errors[n];
      UNROLL_FOR(int bit = 1; bit < 4; bit *= 2) errors += __shfl_xor_sync(0xffffffffu, errors, bit);
      if (lane() % 4 == 0) own[UNIT_PAIRS * 16 * GRADIENT_PITCH + n * 8 + lane() / 4] = errors;
    }
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
      const float errors = total_of(staged, UNIT_PAIRS * 16, map);
      partial[i] =
          weight ? Raw::gradient(c, total_of(staged, term / KERNEL * 8 + term % KERNEL, map), errors, term) : errors;
    }
  }
};

}  // namespace tuned
