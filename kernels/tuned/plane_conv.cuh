// Stage tuned: convolution + bias + activation + subsampling of one image by one team, as conv.cuh, by products of FP16
// planes (planes.cuh): every number is split once, where it is made, instead of each time it is multiplied.
//
// A pixel's channels, and a position's errors of all maps, lie side by side in rows of eights, so that ldmatrix takes a
// row from anywhere: im2col costs an addition. A term is a (tap, channel), a tap an (i, j) of the kernel; a unit is eight
// channels of a tap. The three products:
//   forward           (maps, terms) x (terms, positions)
//   backward_weights  (maps, positions) x (positions, terms), for each image from zero, then added in float32
//   backward_data     ((j, channel), maps) x (maps, columns), for each row of errors and i: a row of the source meets
//                     KERNEL rows of errors, whose sums stay in registers while they pass. What is left is to add up the
//                     KERNEL columns (gather).
// Errors are scaled by a power of two of each image's own (scale_of), which is taken back where they are added up.
//
// conv_common.cuh says what Layer has for ConvSums; besides:
//   FORWARD_N_TILES: tiles of eight positions that a warp makes together; even
//   GROUP: units of the gradient of the weights that a warp makes together
//   ROW_SHARES: tasks among which backward_data divides the rows of errors
//   FOUND_PITCH: floats from a channel's sums of backward_data to the next one's
//   SOURCE_IS_PLANES: the layer before leaves the source as planes (2, pixels, PIXEL) instead of floats; SourceErrors may
//     lie over them
//   GRADIENT_PITCH: floats from a map's gradient to the next one's in Staged
//   UnitOffsets, a table in shared memory; RawWeights, where weights arrive before they are split
#pragma once
#include "../planes.cuh"
#include "conv_common.cuh"

namespace tuned {

template <class Layer, class Threads>
struct PlaneConv : ConvSums<Layer, Threads> {
  using Sums = ConvSums<Layer, Threads>;
  using Sums::AREA, Sums::BLOCK, Sums::CHANNELS, Sums::COLUMNS, Sums::FORWARD_SPLIT_K, Sums::FULL_PITCH, Sums::FUNCTION,
      Sums::HEIGHT, Sums::KEEPS_ACTIVATED, Sums::KERNEL, Sums::MAPS, Sums::METHOD, Sums::OUT_AREA, Sums::OUT_COLUMNS,
      Sums::PARAMETERS, Sums::ROWS, Sums::STRIDE, Sums::TARGET_SIZE, Sums::TEAM, Sums::TEAMS, Sums::TERMS, Sums::lane,
      Sums::thread_rank, Sums::warp, Sums::WARPS, Sums::WIDTH, Sums::WINDOW;
  using Number = unsigned short;  // an FP16
  static constexpr int FORWARD_N_TILES = Layer::FORWARD_N_TILES, GROUP = Layer::GROUP;
  static constexpr int ROW_SHARES = Layer::ROW_SHARES, FOUND_PITCH = Layer::FOUND_PITCH;
  static constexpr int GRADIENT_PITCH = Layer::GRADIENT_PITCH;
  static constexpr bool SENDS_ERRORS_BACK = exists<typename Layer::SourceErrors>;
  static constexpr bool SOURCE_IS_PLANES = Layer::SOURCE_IS_PLANES;

  // Source: (pixels, channels), and a plane's numbers. An odd number of eights keeps neighbours in different banks.
  static constexpr int PIXELS = HEIGHT * WIDTH, EIGHTS = ceil_div(CHANNELS, 8), PIXEL = (EIGHTS | 1) * 8;
  static constexpr int SOURCE_PLANE = PIXELS * PIXEL;
  // Weights: (maps, units), with a last unit of zeros where they are odd.
  static constexpr int MAP_TILES = ceil_div(MAPS, 16), TAPS = KERNEL * KERNEL, UNITS = TAPS * EIGHTS;
  static constexpr int K_STEPS = ceil_div(UNITS, 2), WEIGHT_PITCH = (2 * K_STEPS + 1) * 8;
  static constexpr int WEIGHT_PLANE = MAP_TILES * 16 * WEIGHT_PITCH;
  // Errors: (eights of positions, eights of maps, positions, maps), rows padded to whole tiles and all of them to terms of
  // a product. The eight rows of a matrix lie side by side.
  static constexpr int PADDED_COLUMNS = ceil_div(COLUMNS, 8) * 8;
  static constexpr int POSITIONS = ceil_div(ROWS * PADDED_COLUMNS, 16) * 16;
  static constexpr int MAP_EIGHTS = 2 * MAP_TILES, ERROR_PLANE = POSITIONS * MAP_EIGHTS * 8;
  // A tile of positions is a row, and two of them are a row of windows: a lane has whole windows of its sums.
  static constexpr bool LANES_HAVE_WINDOWS =
      COLUMNS == 8 && ROWS % 2 == 0 && WINDOW == 2 && METHOD == MAX && FORWARD_SPLIT_K == 1;
  // Two planes of numbers take as many floats as one has numbers.
  static constexpr int SPLIT_FLOATS = SOURCE_IS_PLANES ? 0 : SOURCE_PLANE;  // of the source that is split here
  static_assert(Layer::SCRATCH_FLOATS >= SPLIT_FLOATS + FORWARD_SPLIT_K * MAPS * FULL_PITCH,
                "forward's sums lie in Scratch behind the source");

  // backward_data: rows of its left side for each i, in eights; tiles of 16 of them; and what tasks leave.
  static constexpr int DATA_EIGHTS = KERNEL * EIGHTS, DATA_TILES = ceil_div(DATA_EIGHTS, 2);
  static constexpr int UNROLLED_ROWS = 12;  // of a share, at most
  static constexpr int SHARE_ROWS = ceil_div(ROWS, ROW_SHARES), FOUND_SHARE = KERNEL * CHANNELS * FOUND_PITCH;
  static_assert(!SENDS_ERRORS_BACK || FOUND_PITCH >= HEIGHT * PADDED_COLUMNS, "a channel's rows lie side by side");
  static_assert(!SENDS_ERRORS_BACK || STRIDE <= KERNEL, "each row of errors ends as many rows as the stride");
  static_assert(Layer::SCRATCH_FLOATS >= ERROR_PLANE + SPLIT_FLOATS, "errors and source lie in Scratch");
  static_assert(!SENDS_ERRORS_BACK || Layer::SCRATCH_FLOATS >= ERROR_PLANE + ROW_SHARES * FOUND_SHARE,
                "what backward_data finds lies in Scratch where the source was");

  // The gradient of the weights: the bias is one unit more.
  static constexpr int OWN_UNITS = ceil_div(UNITS + 1, WARPS);
  static_assert(GRADIENT_PITCH >= (UNITS + 1) * 8, "a map's gradient has a place for its bias");
  static_assert(Layer::STAGED_FLOATS >= TEAMS * MAP_TILES * 16 * GRADIENT_PITCH,
                "every share of the gradient has a place in Staged");

  static constexpr int STEPS = POSITIONS / 16;
  // Where a step's positions are whole rows, each step begins a number of rows further.
  static constexpr int STEP_ROWS = larger_of(1, 16 / PADDED_COLUMNS);
  static constexpr bool BY_ROWS = COLUMNS == PADDED_COLUMNS && 16 % PADDED_COLUMNS == 0 && ROWS % STEP_ROWS == 0;
  // A warp has a whole column of the kernel where it can: its units then see the same lines, two rows of positions further
  // down what those below have seen. What is left of the kernel, and the bias, is divided among all.
  static constexpr int OF_COLUMNS = larger_of(0, KERNEL - WARPS) * KERNEL;
  static constexpr bool BY_COLUMNS = BY_ROWS && STEP_ROWS == 2 && STRIDE == 1 && EIGHTS == 1 && WARPS <= KERNEL &&
                                     STEPS <= 4 && OWN_UNITS <= GROUP &&
                                     OWN_UNITS == KERNEL + ceil_div(OF_COLUMNS + 1, WARPS);
  // Number `n` of the calling warp's units; UNITS is the bias, and there are none beyond it.
  static __device__ __forceinline__ int unit_of(int n) {
    if (!BY_COLUMNS) return warp() * OWN_UNITS + n;
    if (n < KERNEL) return n * KERNEL + warp();
    const int more = warp() * (OWN_UNITS - KERNEL) + n - KERNEL;
    return more < OF_COLUMNS ? more % KERNEL * KERNEL + WARPS + more / KERNEL : UNITS + more - OF_COLUMNS;
  }

  // Barriers between the parts of a pass; each has a type, so that the emulated device can distinguish them.
  struct Split;
  struct Added;
  struct Unpooled;
  struct Weighed;
  struct Found;
  template <class Site>
  static __device__ __forceinline__ void wait() {
    Threads::template team_barrier<Site>();
  }

  static __device__ __forceinline__ Number* numbers(float* at) { return reinterpret_cast<Number*>(at); }
  static __device__ __forceinline__ const Number* numbers(const float* at) {
    return reinterpret_cast<const Number*>(at);
  }
  static __device__ __forceinline__ void store_row(Number* at, const unsigned (&words)[4]) {
    *reinterpret_cast<uint4*>(at) = make_uint4(words[0], words[1], words[2], words[3]);
  }

  // Where the numbers of a unit begin, from those of a position's first pixel.
  static __device__ __forceinline__ int unit_offset(int unit) {
    const int known = min(unit, UNITS - 1), tap = known / EIGHTS;
    return (tap / KERNEL * WIDTH + tap % KERNEL) * PIXEL + known % EIGHTS * 8;
  }
  // UnitOffsets (2 K_STEPS,): to look them up takes less time than to work them out. At ONE, what the bias is multiplied
  // by: a row of ones, and of zeros for their rests.
  static constexpr int ONE = ceil_div(2 * K_STEPS, 4) * 4;
  static __device__ __forceinline__ void prepare(float* shared) {
    int* const table = reinterpret_cast<int*>(Layer::UnitOffsets::all(shared));
    for (int unit = threadIdx.x; unit < 2 * K_STEPS; unit += BLOCK) table[unit] = unit_offset(unit);
    for (int i = threadIdx.x; i < 8; i += BLOCK) table[ONE + i] = i < 4 ? 0x3c003c00 : 0;
  }

  // Weights: planes (2, maps, WEIGHT_PITCH), then the bias (MAPS,) in floats.
  static constexpr bool COPIES = true;
  template <class Context>
  static __device__ __forceinline__ void copy_weights(Context& c) {
    Sums::copy_parameters(c, Layer::RawWeights::all(c.shared));
  }
  template <class Context>
  static __device__ __forceinline__ void convert_weights(Context& c) {
    const float* raw = Layer::RawWeights::all(c.shared);
    float* weights = Layer::Weights::all(c.shared);
#pragma unroll 1
    for (int i = threadIdx.x; i < MAP_TILES * 16 * 2 * K_STEPS; i += BLOCK) {
      const int map = i / (2 * K_STEPS), unit = i % (2 * K_STEPS), tap = unit / EIGHTS, first = unit % EIGHTS * 8;
      const auto weight = [&](int channel) {
        const bool any = map < MAPS && unit < UNITS && channel < CHANNELS;
        return any ? raw[map * TERMS + channel * TAPS + tap] : 0.0f;
      };
      unsigned whole[4], rest[4];
      UNROLL_FOR(int pair = 0; pair < 4; pair++)
        split_fp16(weight(first + 2 * pair), weight(first + 2 * pair + 1), whole[pair], rest[pair]);
      Number* const row = numbers(weights) + map * WEIGHT_PITCH + unit * 8;
      store_row(row, whole);
      store_row(row + WEIGHT_PLANE, rest);
    }
    for (int map = threadIdx.x; map < MAPS; map += BLOCK) bias_of(weights)[map] = raw[MAPS * TERMS + map];
  }
  static __device__ __forceinline__ float* bias_of(float* weights) { return weights + WEIGHT_PLANE; }

  // The source's planes (2, PIXELS, PIXEL): where it lies, if the layer before has split it, or at `scratch`.
  template <class Place>
  static __device__ __forceinline__ auto planes_of(Place* source, Place* scratch) {
    return numbers(SOURCE_IS_PLANES ? source : scratch);
  }
  // planes = source (CHANNELS, PIXELS)
  static __device__ __forceinline__ void split_source(const float* source, Number* planes) {
    for (int i = thread_rank(); i < PIXELS * EIGHTS; i += TEAM) {
      const int first = EIGHTS == 1 ? 0 : i / PIXELS * 8, pixel = EIGHTS == 1 ? i : i % PIXELS;
      const auto value = [&](int channel) { return channel < CHANNELS ? source[channel * PIXELS + pixel] : 0.0f; };
      unsigned whole[4], rest[4];
      UNROLL_FOR(int pair = 0; pair < 4; pair++)
        split_fp16(value(first + 2 * pair), value(first + 2 * pair + 1), whole[pair], rest[pair]);
      store_row(planes + pixel * PIXEL + first, whole);
      store_row(planes + SOURCE_PLANE + pixel * PIXEL + first, rest);
    }
  }

  template <class Context>
  static __device__ __forceinline__ void forward(Context& c, int slot) {
    float* const shared = c.shared;
    float* const weights = Layer::Weights::all(shared);
    float* const scratch = Layer::Scratch::image(shared, slot);
    float* const sums = scratch + SPLIT_FLOATS;
    Number* const planes = planes_of(Layer::Source::image(shared, slot), scratch);
    if constexpr (!SOURCE_IS_PLANES) {
      split_source(Layer::Source::image(shared, slot), planes);
      wait<Split>();
    }
    float* const target = Layer::Target::image(shared, slot);
    unsigned char* const winners = Sums::winners_of(shared, slot);
    add_up(planes, numbers(weights), reinterpret_cast<const int*>(Layer::UnitOffsets::all(shared)), bias_of(weights),
           target, winners, sums);
    if constexpr (!LANES_HAVE_WINDOWS) {
      wait<Added>();
      Sums::finish(bias_of(weights), target, winners, Layer::Full::image(shared, slot), sums);
    }
  }

  // sum[n] += left right[n], the first `count`: products that wait for each other lie as far apart as can be.
  template <class Sum, int N>
  static __device__ __forceinline__ void add_products(Sum (&sum)[N], const unsigned (&left)[4],
                                                      const unsigned (&left_rest)[4], const unsigned (&right)[N][2],
                                                      const unsigned (&right_rest)[N][2], int count = N) {
    UNROLL_FOR(int n = 0; n < N; n++)
      if (n < count) mma_fp16(sum[n].rest, left_rest, right[n]);
    UNROLL_FOR(int n = 0; n < N; n++)
      if (n < count) mma_fp16(sum[n].whole, left, right[n]);
    UNROLL_FOR(int n = 0; n < N; n++)
      if (n < count) mma_fp16(crossed_of(sum[n]), left, right_rest[n]);
  }

  // sums (FORWARD_SPLIT_K, MAPS, FULL_PITCH) of the positions' products; or, where lanes have whole windows, what finish
  // makes of them.
  static __device__ __forceinline__ void add_up(const Number* planes, const Number* weights, const int* offsets,
                                                const float* bias, float* target, unsigned char* winners, float* sums) {
    constexpr int TILES = ceil_div(AREA, 8), GROUPS = ceil_div(TILES, FORWARD_N_TILES), PAIRS = FORWARD_N_TILES / 2;
    constexpr int STEPS = ceil_div(K_STEPS, FORWARD_SPLIT_K);
    static_assert(FORWARD_N_TILES % 2 == 0, "ldmatrix takes two tiles at a time");
    for (int task = warp(); task < MAP_TILES * GROUPS * FORWARD_SPLIT_K; task += WARPS) {
      const int share = task / (MAP_TILES * GROUPS), map0 = task / GROUPS % MAP_TILES * 16;
      const int tile0 = task % GROUPS * FORWARD_N_TILES;
      const Number* left = weights + (map0 + lane() % 16) * WEIGHT_PITCH + lane() / 16 * 8;
      const Number* pixels[PAIRS];
      UNROLL_FOR(int n = 0; n < PAIRS; n++) {
        const int at = min((tile0 + 2 * n + lane() / 16) * 8 + lane() % 8, AREA - 1);
        pixels[n] = planes + (at / COLUMNS * WIDTH + at % COLUMNS) * STRIDE * PIXEL;
      }
      std::conditional_t<FORWARD_N_TILES <= 2, ApartSum, PlaneSum> sum[FORWARD_N_TILES];
      UNROLL_FOR(int n = 0; n < FORWARD_N_TILES; n++) sum[n].clear();
#pragma unroll(STEPS* FORWARD_N_TILES <= 32 ? STEPS : 4)
      for (int n = 0; n < STEPS; n++) {
        const int k = share + n * FORWARD_SPLIT_K;
        if (K_STEPS % FORWARD_SPLIT_K && n == STEPS - 1 && k >= K_STEPS) break;
        const int offset = offsets[2 * k + lane() / 8 % 2];
        unsigned whole[4], rest[4], right[FORWARD_N_TILES][2], right_rest[FORWARD_N_TILES][2];
        load_matrices(whole, left + k * 16);
        load_matrices(rest, left + k * 16 + WEIGHT_PLANE);
        UNROLL_FOR(int pair = 0; pair < PAIRS; pair++) {
          unsigned both[4], both_rests[4];
          load_matrices(both, pixels[pair] + offset);
          load_matrices(both_rests, pixels[pair] + offset + SOURCE_PLANE);
          UNROLL_FOR(int i = 0; i < 4; i++) {
            right[2 * pair + i / 2][i % 2] = both[i];
            right_rest[2 * pair + i / 2][i % 2] = both_rests[i];
          }
        }
        add_products(sum, whole, rest, right, right_rest);
      }
      if constexpr (LANES_HAVE_WINDOWS) {
        UNROLL_FOR(int n = 0; n < FORWARD_N_TILES; n += 2)
          UNROLL_FOR(int lower = 0; lower < 2; lower++) {
            const int map = map0 + lane() / 4 + lower * 8, at = map * OUT_AREA + (tile0 + n) / 2 * 4 + lane() % 4;
            float value[2][2];
            UNROLL_FOR(int i = 0; i < 4; i++) value[i / 2][i % 2] = sum[n + i / 2].at(2 * lower + i % 2);
            int winner;
            const float largest = largest_of_window(value, winner);
            const float result = activate<FUNCTION>(largest + bias[min(map, MAPS - 1)]);
            if ((MAPS % 16 == 0 || map < MAPS) && (TILES % FORWARD_N_TILES == 0 || tile0 + n < TILES))
              target[at] = result, winners[at] = (unsigned char)winner;
          }
      } else {
        UNROLL_FOR(int n = 0; n < FORWARD_N_TILES; n++)
          if (tile0 + n < TILES)
            UNROLL_FOR(int lower = 0; lower < 2; lower++) {
              const int map = map0 + lane() / 4 + lower * 8, at = (tile0 + n) * 8 + lane() % 4 * 2;
              if (MAPS % 16 == 0 || map < MAPS)
                *reinterpret_cast<Pair*>(sums + (share * MAPS + map) * FULL_PITCH + at) = {sum[n].at(2 * lower),
                                                                                           sum[n].at(2 * lower + 1)};
            }
      }
    }
  }

  // A warp's share of the gradient: tiles of (maps, a unit's channels).
  struct Accumulators {
    Fragment tile[MAP_TILES][OWN_UNITS];
  };
  static __device__ __forceinline__ void clear(Accumulators& sums) { ::clear(sums.tile); }

  template <class Context>
  static __device__ __forceinline__ void backward(Context& c, int slot, Accumulators& sums) {
    float* const shared = c.shared;
    float* const scratch = Layer::Scratch::image(shared, slot);
    Number* const errors = numbers(scratch);
    Number* const planes = planes_of(Layer::Source::image(shared, slot), scratch + ERROR_PLANE);
    float* const found = scratch + ERROR_PLANE;  // if the source was split to there, when it has been used
    const float* const target_errors = Layer::TargetErrors::image(shared, slot);
    const float scale = scale_of(target_errors, TARGET_SIZE);
    if constexpr (!SOURCE_IS_PLANES) split_source(Layer::Source::image(shared, slot), planes);
    unpool(Layer::Target::image(shared, slot), Sums::winners_of(shared, slot), target_errors,
           Layer::Full::image(shared, slot), scale, errors);
    wait<Unpooled>();
    backward_weights(planes, errors, reinterpret_cast<const int*>(Layer::UnitOffsets::all(shared)), unscale(scale),
                     sums);
    if constexpr (SENDS_ERRORS_BACK) {
      if constexpr (!SOURCE_IS_PLANES) wait<Weighed>();
      backward_data(errors, numbers(Layer::Weights::all(shared)), found);
      wait<Found>();  // behind it the source is not needed any more
      gather(found, unscale(scale), Layer::SourceErrors::image(shared, slot));
    }
  }

  // errors (2, POSITIONS, POSITION) = derivative of the loss by the convolution's sums, times `scale`: the target's
  // errors (TARGET_SIZE,), each at the place in its window that it belongs to. A thread has two maps of a window.
  static __device__ __forceinline__ void unpool(const float* target, const unsigned char* winners,
                                                const float* target_errors, const float* full, float scale,
                                                Number* errors) {
    constexpr int PAIRS = MAP_TILES * 8;
    constexpr bool MEANS = WINDOW > 1 && METHOD == MEAN;
    const auto store = [&](int row, int column, int pair, unsigned whole, unsigned rest) {
      const int eight = row * (PADDED_COLUMNS / 8) + column / 8;
      Number* at = errors + ((eight * MAP_EIGHTS + pair / 4) * 8 + column % 8) * 8 + pair % 4 * 2;
      *reinterpret_cast<unsigned*>(at) = whole;
      *reinterpret_cast<unsigned*>(at + ERROR_PLANE) = rest;
    };
    for (int i = thread_rank(); i < PAIRS * OUT_AREA; i += TEAM) {
      const int pair = i / (4 * OUT_AREA) * 4 + i % 4, window = i / 4 % OUT_AREA;
      const int y = window / OUT_COLUMNS * WINDOW, x = window % OUT_COLUMNS * WINDOW;
      float error[2];
      int winner[2];
      UNROLL_FOR(int n = 0; n < 2; n++) {
        const int at = min(2 * pair + n, MAPS - 1) * OUT_AREA + window;
        const bool there = MAPS % 16 == 0 || 2 * pair + n < MAPS;
        const float own = there ? target_errors[at] * scale : 0.0f;
        error[n] = MEANS ? own / float(WINDOW * WINDOW) : own * slope<FUNCTION>(target[at]);
        winner[n] = WINDOW > 1 && METHOD == MAX ? winners[at] : 0;
      }
      unsigned whole, rest;
      split_fp16(error[0], error[1], whole, rest);
      UNROLL_FOR(int a = 0; a < WINDOW; a++)
        UNROLL_FOR(int n = 0; n < WINDOW; n++) {
          // every second row of windows takes the columns of two in the other order, so that lanes have different banks
          const int b = WINDOW == 2 ? n ^ (window / OUT_COLUMNS % 2) : n;
          if (MEANS && KEEPS_ACTIVATED) {
            float sloped[2];
            UNROLL_FOR(int n = 0; n < 2; n++)
              sloped[n] = error[n] *
                          slope<FUNCTION>(full[min(2 * pair + n, MAPS - 1) * FULL_PITCH + (y + a) * COLUMNS + x + b]);
            split_fp16(sloped[0], sloped[1], whole, rest);
          }
          const unsigned lower = MEANS || winner[0] == a * WINDOW + b ? 0x0000ffffu : 0u;
          const unsigned upper = MEANS || winner[1] == a * WINDOW + b ? 0xffff0000u : 0u;
          store(y + a, x + b, pair, whole & (lower | upper), rest & (lower | upper));
        }
    }
    // positions that there are only for whole tiles
    constexpr int BESIDE = PADDED_COLUMNS - COLUMNS, BELOW = POSITIONS - ROWS * PADDED_COLUMNS;
    for (int i = thread_rank(); i < ROWS * BESIDE * PAIRS; i += TEAM)
      store(i / PAIRS / max(1, BESIDE), COLUMNS + i / PAIRS % max(1, BESIDE), i % PAIRS, 0, 0);
    for (int i = thread_rank(); i < BELOW * PAIRS; i += TEAM) store(ROWS, i / PAIRS, i % PAIRS, 0, 0);
  }

  // sums += this image's share of the gradient of the weights and, as the last unit, of the bias.
  static __device__ __forceinline__ void backward_weights(const Number* planes, const Number* errors,
                                                          const int* offsets, float inverse, Accumulators& sums) {
    const Number* const one = reinterpret_cast<const Number*>(offsets + ONE) + lane() / 16 * 8;
    const auto pixel_of = [](int position) {
      const int row = min(position / PADDED_COLUMNS, ROWS - 1), column = min(position % PADDED_COLUMNS, COLUMNS - 1);
      return (row * WIDTH + column) * STRIDE * PIXEL;
    };
    if (unit_of(0) > UNITS) return;
    UNROLL_FOR(int own = 0; own < OWN_UNITS; own += GROUP) {
      const int count = min(GROUP, OWN_UNITS - own);
      PlaneSum sum[MAP_TILES][GROUP];
      // A warp multiplies as many units as any has, so that nothing of a step waits for a branch; stage_gradient leaves
      // out those beyond the last.
      const Number* unit_at[GROUP];
      int step[GROUP];
      UNROLL_FOR(int n = 0; n < GROUP; n++) {
        UNROLL_FOR(int m = 0; m < MAP_TILES; m++) sum[m][n].clear();
        const bool is_bias = unit_of(own + n) >= UNITS;
        const Number* unit = planes + offsets[min(unit_of(own + n), UNITS - 1)] + lane() / 16 * SOURCE_PLANE;
        unit_at[n] = is_bias ? one : BY_ROWS ? unit + pixel_of(lane() % 16) : unit;
        step[n] = is_bias ? 0 : BY_ROWS ? STEP_ROWS * WIDTH * STRIDE * PIXEL : 1;
      }
      unsigned lines[2 * STEPS + KERNEL][4];
#pragma unroll(STEPS <= 4 ? STEPS : 2)
      for (int k = 0; k < STEPS; k++) {
        const Number* left = errors + (((2 * k + lane() / 16) * MAP_EIGHTS + lane() / 8 % 2) * 8 + lane() % 8) * 8;
        unsigned whole[MAP_TILES][4], rest[MAP_TILES][4], terms[GROUP][2], term_rests[GROUP][2];
        UNROLL_FOR(int m = 0; m < MAP_TILES; m++) {
          load_matrices_transposed(whole[m], left + m * 128);
          load_matrices_transposed(rest[m], left + m * 128 + ERROR_PLANE);
        }
        UNROLL_FOR(int n = 0; n < GROUP; n++) {
          if (n >= count) continue;
          unsigned both[4];
          if (BY_COLUMNS && n < KERNEL) {
            const int line = 2 * k + n;
            if (k == 0 || n >= KERNEL - 2) load_matrices_transposed(lines[line], unit_at[0] + line * WIDTH * PIXEL);
            UNROLL_FOR(int i = 0; i < 4; i++) both[i] = lines[line][i];
          } else {
            load_matrices_transposed(both, unit_at[n] + (BY_ROWS ? 0 : step[n] * pixel_of(k * 16 + lane() % 16)));
            if (BY_ROWS) unit_at[n] += step[n];
          }
          terms[n][0] = both[0], terms[n][1] = both[1];
          term_rests[n][0] = both[2], term_rests[n][1] = both[3];
        }
        UNROLL_FOR(int m = 0; m < MAP_TILES; m++) add_products(sum[m], whole[m], rest[m], terms, term_rests, count);
      }
      UNROLL_FOR(int m = 0; m < MAP_TILES; m++)
        UNROLL_FOR(int n = 0; n < GROUP; n++)
          if (own + n < OWN_UNITS)
            UNROLL_FOR(int i = 0; i < 4; i++) {
              float& total = sums.tile[m][own + n].at[i];
              total = fmaf(sum[m][n].at(i), inverse, total);
            }
    }
  }

  // Which half of a row of eight columns comes first in `found`: it changes with every four rows, so that the eight lanes
  // that load halves of neighbouring rows have different banks. TURNS: where the compiler knows which row a task leaves.
  static constexpr bool TURNS = PADDED_COLUMNS == 8 && ROWS % SHARE_ROWS == 0 && SHARE_ROWS <= UNROLLED_ROWS &&
                                (ROW_SHARES == 1 || SHARE_ROWS * STRIDE % 4 == 0);
  static __device__ __forceinline__ int first_half(int channel, int y) { return TURNS ? (y / 4 ^ channel) % 2 * 4 : 0; }

  // found (ROW_SHARES, KERNEL * CHANNELS, FOUND_PITCH): for each (j, channel) and row of the source, what each column of
  // errors adds, by the rows of errors of a share.
  static __device__ __forceinline__ void backward_data(const Number* errors, const Number* weights, float* found) {
    constexpr int X_TILES = PADDED_COLUMNS / 8;
    for (int task = warp(); task < DATA_TILES * X_TILES * ROW_SHARES; task += WARPS) {
      const int tile = task % DATA_TILES, column0 = task / DATA_TILES % X_TILES * 8;
      const int share = task / (DATA_TILES * X_TILES), row0 = share * SHARE_ROWS;
      unsigned whole[KERNEL][MAP_TILES][4], rest[KERNEL][MAP_TILES][4];
      UNROLL_FOR(int i = 0; i < KERNEL; i++)
        UNROLL_FOR(int m = 0; m < MAP_TILES; m++) {
          const Number* left = weights + (m * 16 + lane() / 16 * 8 + lane() % 8) * WEIGHT_PITCH +
                               (i * DATA_EIGHTS + tile * 2 + lane() / 8 % 2) * 8;
          load_matrices_transposed(whole[i][m], left);
          load_matrices_transposed(rest[i][m], left + WEIGHT_PLANE);
        }
      const Number* right = errors +
                            (((row0 * X_TILES + column0 / 8) * MAP_EIGHTS + lane() / 8 % 2) * 8 + lane() % 8) * 8 +
                            lane() / 16 * ERROR_PLANE;
      // only channels that there are
      float* out[2][2];  // of the first four rows that this task leaves, and those whose halves lie as theirs do
      bool there[2];
      UNROLL_FOR(int lower = 0; lower < 2; lower++) {
        const int eight = tile * 2 + lower, channel = eight % EIGHTS * 8 + lane() / 4;
        there[lower] = (DATA_EIGHTS % 2 == 0 || eight < DATA_EIGHTS) && (CHANNELS % 8 == 0 || channel < CHANNELS);
        const int column = column0 + lane() % 4 * 2;
        UNROLL_FOR(int other = 0; other < 2; other++)
          out[lower][other] = found + share * FOUND_SHARE + (eight / EIGHTS * CHANNELS + channel) * FOUND_PITCH +
                              row0 * STRIDE * PADDED_COLUMNS +
                              (column ^ first_half(channel, row0 * STRIDE + other * 4));
      }
      const auto leave = [&](const PlaneSum& sum, int row) {
        UNROLL_FOR(int lower = 0; lower < 2; lower++)
          if (there[lower])
            *reinterpret_cast<Pair*>(out[lower][TURNS ? row / 4 % 2 : 0] + row * PADDED_COLUMNS) = {
                sum.at(2 * lower), sum.at(2 * lower + 1)};
      };
      PlaneSum sum[KERNEL];  // of the rows of the source that this row of errors meets
      UNROLL_FOR(int i = 0; i < KERNEL; i++) sum[i].clear();
#pragma unroll(SHARE_ROWS <= UNROLLED_ROWS ? SHARE_ROWS : 1)
      for (int n = 0; n < SHARE_ROWS; n++) {
        if (ROWS % SHARE_ROWS && row0 + n >= ROWS) break;
        UNROLL_FOR(int m = 0; m < MAP_TILES; m++) {
          unsigned both[4];
          load_matrices(both, right + (n * X_TILES * MAP_EIGHTS + 2 * m) * 64);
          const unsigned row[2] = {both[0], both[1]}, row_rests[2] = {both[2], both[3]};
          UNROLL_FOR(int i = 0; i < KERNEL; i++) mma_fp16(sum[i].rest, rest[i][m], row);
          UNROLL_FOR(int i = 0; i < KERNEL; i++) mma_fp16(sum[i].whole, whole[i][m], row);
          UNROLL_FOR(int i = 0; i < KERNEL; i++) mma_fp16(sum[i].rest, whole[i][m], row_rests);
        }
        UNROLL_FOR(int i = 0; i < STRIDE; i++) leave(sum[i], n * STRIDE + i);
        UNROLL_FOR(int i = 0; i < KERNEL; i++) {
          if (i + STRIDE < KERNEL)
            sum[i] = sum[(i + STRIDE) % KERNEL];
          else
            sum[i].clear();
        }
      }
      const int rows = ROWS % SHARE_ROWS ? min(ROWS - row0, SHARE_ROWS) : SHARE_ROWS;
      UNROLL_FOR(int i = 0; i < KERNEL - STRIDE; i++) leave(sum[i], rows * STRIDE + i);
    }
  }

  // source_errors (CHANNELS, HEIGHT, WIDTH): each thread adds up a row.
  static __device__ __forceinline__ void gather(const float* found, float inverse, float* source_errors) {
    for (int at = thread_rank(); at < CHANNELS * HEIGHT; at += TEAM) {
      const int channel = at / HEIGHT, y = at % HEIGHT, first = first_half(channel, y);
      float error[WIDTH];
      UNROLL_FOR(int x = 0; x < WIDTH; x++) error[x] = 0.0f;
#pragma unroll
      for (int share = 0; share < ROW_SHARES; share++) {
        const int end = min(ROWS, (share + 1) * SHARE_ROWS);
        if (y < share * SHARE_ROWS * STRIDE || y >= (end - 1) * STRIDE + KERNEL) continue;
        UNROLL_FOR(int j = 0; j < KERNEL; j++) {
          const float* row = found + share * FOUND_SHARE + (j * CHANNELS + channel) * FOUND_PITCH + y * PADDED_COLUMNS;
          UNROLL_FOR(int x = 0; x < PADDED_COLUMNS; x += 4) {
            const Float4 four = *reinterpret_cast<const Float4*>(row + (x ^ first));
            UNROLL_FOR(int n = 0; n < 4; n++)
              if (x + n < COLUMNS) error[(x + n) * STRIDE + j] += four.at[n];
          }
        }
      }
      float* out = source_errors + at * WIDTH;
      UNROLL_FOR(int x = 0; x < WIDTH; x++) out[x] = error[x] * inverse;
    }
  }

  // Staged (TEAMS, maps, GRADIENT_PITCH) = every warp's share of the gradient, of every team.
  template <class Context>
  static __device__ __forceinline__ void stage_gradient(Context& c, const Accumulators& sums) {
    float* own = Layer::Staged::all(c.shared) + Threads::team() * MAP_TILES * 16 * GRADIENT_PITCH;
    UNROLL_FOR(int m = 0; m < MAP_TILES; m++)
      UNROLL_FOR(int n = 0; n < OWN_UNITS; n++) {
        const int unit = unit_of(n);
        if (unit > UNITS) continue;
        UNROLL_FOR(int lower = 0; lower < 2; lower++)
          *reinterpret_cast<Pair*>(own + (m * 16 + lane() / 4 + lower * 8) * GRADIENT_PITCH + unit * 8 +
                                   lane() % 4 * 2) = {sums.tile[m][n].at[2 * lower], sums.tile[m][n].at[2 * lower + 1]};
      }
  }

  // The layer's partial sums = weight gradient (MAPS, TERMS), then bias gradient. After stage_gradient and a barrier.
  template <class Context, class Row>
  static __device__ __forceinline__ void store_gradient(Context& c, Row partials) {
    const Row partial = partials + Layer::FIRST_PARTIAL;
    const float* staged = Layer::Staged::all(c.shared);
    // a thread has all channels of a tap, which lie side by side
    for (int i = threadIdx.x; i < MAPS * TAPS; i += BLOCK) {
      const int map = i / TAPS, tap = i % TAPS;
#pragma unroll(EIGHTS <= 2 ? EIGHTS : 1)
      for (int eight = 0; eight < EIGHTS; eight++) {
        float total[8];
        UNROLL_FOR(int n = 0; n < 8; n++) total[n] = 0.0f;
        UNROLL_FOR(int team = 0; team < TEAMS; team++)
          UNROLL_FOR(int n = 0; n < 8; n++)
            total[n] += reinterpret_cast<const Float4*>(staged + (team * MAP_TILES * 16 + map) * GRADIENT_PITCH +
                                                        (tap * EIGHTS + eight) * 8)[n / 4]
                            .at[n % 4];
        UNROLL_FOR(int n = 0; n < 8; n++)
          if (eight * 8 + n < CHANNELS) partial[map * TERMS + (eight * 8 + n) * TAPS + tap] = total[n];
      }
    }
    // by the last threads, which have less to do above
    for (int map = BLOCK - 1 - threadIdx.x; map < MAPS; map += BLOCK) {
      float total = 0.0f;
      UNROLL_FOR(int team = 0; team < TEAMS; team++)
        total += staged[(team * MAP_TILES * 16 + map) * GRADIENT_PITCH + UNITS * 8];
      partial[MAPS * TERMS + map] = total;
    }
  }
};

}  // namespace tuned
