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

  // Rows (CHANNELS, HEIGHT, COLUMNS, 8): those that some position's line begins with.
  static constexpr int LINES = CHANNELS * HEIGHT, ROW_NUMBERS = LINES * COLUMNS * 8;
  static_assert(Layer::SCRATCH_FLOATS >= ROW_NUMBERS / 2, "rows lie in Scratch");
  // Weights (maps, units, 8), with a last unit of zeros where they are odd.
  static constexpr int UNITS = CHANNELS * KERNEL, UNIT_PAIRS = ceil_div(UNITS, 2), N_TILES = ceil_div(MAPS, 8);
  static constexpr int WEIGHT_PITCH = (2 * UNIT_PAIRS + 1) * 8, WEIGHT_PLANE = N_TILES * 8 * WEIGHT_PITCH;
  // The gradient: every warp has sums of its own, over a share of the windows.
  static constexpr int WINDOW_STEPS = ceil_div(OUT_AREA, 4);
  static constexpr int STAGED_SHARE = (UNIT_PAIRS * 16 + 1) * GRADIENT_PITCH;
  static_assert(GRADIENT_PITCH >= N_TILES * 8, "a term's gradient has a place for each map");
  static_assert(Layer::STAGED_FLOATS >= TEAMS * WARPS * STAGED_SHARE, "every warp's gradient has a place in Staged");

  struct Laid;
  struct LaidAgain;

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
      *reinterpret_cast<uint4*>(rows + i * 8) = make_uint4(two(0), two(2), two(4), two(6));
    }
  }

  // The row of a position, whose window and place in it are given, for a unit.
  static __device__ __forceinline__ const Number* row_of(const Number* rows, int window, int a, int b) {
    const int known = min(window, OUT_AREA - 1);
    return rows + ((known / OUT_COLUMNS * 2 + a) * COLUMNS + known % OUT_COLUMNS * 2 + b) * 8;
  }
  static __device__ __forceinline__ int unit_offset(int unit) {
    const int known = min(unit, UNITS - 1);
    return (known / KERNEL * HEIGHT + known % KERNEL) * COLUMNS * 8;
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
    // Positions of the upper four windows are taken in the order 1, 0 of columns, so that rows lie in different banks.
    const int other = lane() % 8 / 4, swapped = lane() / 16;
    for (int window0 = warp() * 8; window0 < OUT_AREA; window0 += WARPS * 8) {
      PlaneSum sum[2][N_TILES];
      UNROLL_FOR(int a = 0; a < 2; a++) {
        UNROLL_FOR(int n = 0; n < N_TILES; n++) sum[a][n].clear();
        const Number* position = row_of(rows, window0 + lane() % 8, a, lane() / 8 % 2 ^ other);
        UNROLL_FOR(int k = 0; k < UNIT_PAIRS; k++) {
          unsigned left[4];
          load_matrices(left, position + (lane() / 16 ? unit_offset(2 * k + 1) : unit_offset(2 * k)));
          UNROLL_FOR(int n = 0; n < N_TILES; n++) {
            const unsigned whole[2] = {right[k][n][0], right[k][n][1]}, rest[2] = {right[k][n][2], right[k][n][3]};
            mma_fp16(sum[a][n].rest, left, rest);
            mma_fp16(sum[a][n].whole, left, whole);
          }
        }
      }
      const int window = window0 + lane() / 4;
      UNROLL_FOR(int n = 0; n < N_TILES; n++)
        UNROLL_FOR(int odd = 0; odd < 2; odd++) {
          const int map = n * 8 + lane() % 4 * 2 + odd;
          float value[4];
          UNROLL_FOR(int a = 0; a < 2; a++) {
            const float first = sum[a][n].at(odd), second = sum[a][n].at(2 + odd);
            value[2 * a] = swapped ? second : first, value[2 * a + 1] = swapped ? first : second;
          }
          const float largest = max_or_nan(max_or_nan(value[0], value[1]), max_or_nan(value[2], value[3]));
          int winner = 3;
          UNROLL_FOR(int i = 2; i >= 0; i--)
            if (value[i] == largest) winner = i;
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

  // Where a lane's map and window lie in the target, in step `step` of the windows.
  static __device__ __forceinline__ int place_of(int step, int n) {
    return min(n * 8 + lane() / 4, MAPS - 1) * OUT_AREA + min(step * 4 + lane() % 4, OUT_AREA - 1);
  }
  static __device__ __forceinline__ bool has_place(int step, int n) {
    return (MAPS % 8 == 0 || n * 8 + lane() / 4 < MAPS) && (OUT_AREA % 4 == 0 || step * 4 + lane() % 4 < OUT_AREA);
  }

  // sums += this image's share.
  static __device__ __forceinline__ void backward_weights(const Number* rows, const float* target,
                                                          const unsigned char* winners, const float* target_errors,
                                                          Accumulators& sums) {
    unsigned largest = 0;
    for (int step = warp(); step < WINDOW_STEPS; step += WARPS)
      UNROLL_FOR(int n = 0; n < N_TILES; n++) largest = max(largest, bits_of_size(target_errors[place_of(step, n)]));
    const float scale = scale_of(largest);
    PlaneSum sum[UNIT_PAIRS][N_TILES];
    UNROLL_FOR(int m = 0; m < UNIT_PAIRS; m++)
      UNROLL_FOR(int n = 0; n < N_TILES; n++) sum[m][n].clear();
    for (int step = warp(); step < WINDOW_STEPS; step += WARPS) {
      const Number* position = row_of(rows, step * 4 + lane() % 8 / 2, lane() / 16, lane() % 2);
      unsigned left[UNIT_PAIRS][4];
      UNROLL_FOR(int m = 0; m < UNIT_PAIRS; m++)
        load_matrices_transposed(left[m], position + (lane() / 8 % 2 ? unit_offset(2 * m + 1) : unit_offset(2 * m)));
      UNROLL_FOR(int n = 0; n < N_TILES; n++) {
        const int at = place_of(step, n), winner = winners[at];
        const float error = has_place(step, n) ? target_errors[at] * slope<FUNCTION>(target[at]) : 0.0f;
        sums.errors[n] += error;
        unsigned whole, rest;
        split_fp16(error * scale, error * scale, whole, rest);
        const unsigned half = winner % 2 ? 0xffff0000u : 0x0000ffffu;
        whole &= half, rest &= half;
        const unsigned right[2] = {winner < 2 ? whole : 0u, winner < 2 ? 0u : whole};
        const unsigned right_rest[2] = {winner < 2 ? rest : 0u, winner < 2 ? 0u : rest};
        UNROLL_FOR(int m = 0; m < UNIT_PAIRS; m++) {
          mma_fp16(sum[m][n].rest, left[m], right_rest);
          mma_fp16(sum[m][n].whole, left[m], right);
        }
      }
    }
    const float inverse = unscale(scale);
    UNROLL_FOR(int m = 0; m < UNIT_PAIRS; m++)
      UNROLL_FOR(int n = 0; n < N_TILES; n++)
        UNROLL_FOR(int i = 0; i < 4; i++) {
          float& total = sums.tile[m][n].at[i];
          total = fmaf(sum[m][n].at(i), inverse, total);
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
