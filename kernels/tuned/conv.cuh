// Stage tuned: convolution + bias + activation + subsampling of one image by one team, all in shared memory.
// conv_common.cuh says what Layer has; besides, TermOffsets, a table in shared memory.
#pragma once
#include "conv_common.cuh"

namespace tuned {

template <class Layer, class Threads, class Split = Split3xTF32>
struct Conv : ConvCommon<Layer, Threads> {
  using Common = ConvCommon<Layer, Threads>;
  using Common::AREA, Common::BLOCK, Common::CHANNELS, Common::COLUMNS, Common::first_term, Common::FORWARD_M_TILES,
      Common::FORWARD_SPLIT_K, Common::FULL_PITCH, Common::HEIGHT, Common::KERNEL, Common::KEEPS_ACTIVATED,
      Common::MAPS, Common::N_TILES, Common::own_split, Common::PARAMETERS, Common::POSITION_K_TILES,
      Common::POSITION_TILES, Common::ROWS, Common::STRIDE, Common::TEAM, Common::TERMS, Common::thread_rank,
      Common::WARPS, Common::WEIGHTS_SPLIT_K, Common::WIDTH;
  using typename Common::Accumulators;

  static constexpr int SOURCE_SIZE = CHANNELS * HEIGHT * WIDTH;
  static constexpr int K_TILES = ceil_div(TERMS, 8);
  static constexpr bool SHORT_ROWS = COLUMNS <= 32 && WIDTH <= 32;  // a row fits a thread's registers
  static constexpr int DATA_SPLIT_K = Layer::DATA_SPLIT_K, DATA_PITCH = Layer::DATA_PITCH;
  static constexpr bool SENDS_ERRORS_BACK = exists<typename Layer::SourceErrors>;
  static_assert(Split::K == 8, "tiles of eight terms");
  static_assert(DATA_SPLIT_K == 1 || SHORT_ROWS, "only rows in registers are shared");
  static_assert(DATA_SPLIT_K == 1 || DATA_PITCH >= SOURCE_SIZE, "source errors lie between two shares");
  static_assert(DATA_SPLIT_K == 1 || !SENDS_ERRORS_BACK ||
                    Layer::SCRATCH_FLOATS >= (KEEPS_ACTIVATED ? 0 : MAPS * FULL_PITCH) + DATA_SPLIT_K * DATA_PITCH,
                "shares of the source errors lie in Scratch, behind what unpool has left there");

  // Weights are used as they come: they are copied from a 16-byte boundary to another.
  static constexpr bool COPIES = true;
  template <class Context>
  static __device__ __forceinline__ void copy_weights(Context& c) {
    Common::copy_parameters(c, Layer::Weights::all(c.shared));
  }

  // From a position's first source unit to that of a term; padded terms may point anywhere: their weight is 0.
  static __device__ __forceinline__ int term_offset(int term) {
    if (term >= TERMS) return 0;
    return (term / (KERNEL * KERNEL) * HEIGHT + term / KERNEL % KERNEL) * WIDTH + term % KERNEL;
  }

  // TermOffsets (K_TILES * 8,): of every term, since to work it out takes longer than to look it up.
  static __device__ __forceinline__ void prepare(float* shared) {
    for (int term = threadIdx.x; term < K_TILES * 8; term += BLOCK)
      reinterpret_cast<int*>(Layer::TermOffsets::all(shared))[term] = term_offset(term);
  }

  // A position's first source unit, in channel 0.
  static __device__ __forceinline__ int position_offset(int position) {
    const int at = min(position, AREA - 1);
    return (at / COLUMNS * WIDTH + at % COLUMNS) * STRIDE;
  }

  template <class Context>
  static __device__ __forceinline__ void forward(Context& c, int slot) {
    float* const shared = c.shared;
    forward_image(Layer::Source::image(shared, slot), Layer::Weights::all(shared), Layer::Target::image(shared, slot),
                  Common::winners_of(shared, slot), Layer::Full::image(shared, slot),
                  Layer::Scratch::image(shared, slot), Layer::TermOffsets::all(shared));
  }

  // source (SOURCE_SIZE,) -> target (TARGET_SIZE,). weights (MAPS, TERMS), then bias (MAPS,). offsets: see prepare.
  // scratch: FORWARD_SPLIT_K * MAPS * FULL_PITCH floats.
  static __device__ __forceinline__ void forward_image(const float* source, const float* weights, float* target,
                                                       unsigned char* winners, float* full, float* scratch,
                                                       const float* offsets) {
    const int* term_at = reinterpret_cast<const int*>(offsets);
    constexpr int TASKS = ceil_div(POSITION_TILES, FORWARD_M_TILES);
    for (int task = thread_rank() / 32; task < TASKS * FORWARD_SPLIT_K; task += WARPS) {
      const int share = task / TASKS, position0 = task % TASKS * FORWARD_M_TILES * 16;
      Fragment sum[FORWARD_M_TILES][N_TILES];
      ::clear(sum);
#pragma unroll 2
      for (int k = share; k < K_TILES; k += FORWARD_SPLIT_K)
        Split::template multiply<false>(
            sum,
            [&](int m, int row, int pair) -> Pair {
              const float* corner = source + position_offset(position0 + m * 16 + row);
              return {corner[term_at[k * 8 + pair]], corner[term_at[k * 8 + pair + 4]]};
            },
            [&](int, int n, int pair, int map) -> Pair {
              const float* weight = weights + min(n * 8 + map, MAPS - 1) * TERMS + k * 8 + pair;
              return {k * 8 + pair < TERMS ? weight[0] : 0.0f, k * 8 + pair + 4 < TERMS ? weight[4] : 0.0f};
            });
      Common::store_sums(sum, position0, scratch + share * MAPS * FULL_PITCH);
    }
    Threads::template team_barrier<Conv>();
    Common::finish(weights + MAPS * TERMS, target, winners, full, scratch);
  }

  template <class Context>
  static __device__ __forceinline__ void backward(Context& c, int slot, Accumulators& sums) {
    float* const shared = c.shared;
    float* const full = Layer::Full::image(shared, slot);
    Common::unpool(Layer::Target::image(shared, slot), Common::winners_of(shared, slot),
                   Layer::TargetErrors::image(shared, slot), full);
    Threads::template team_barrier<Conv>();
    backward_weights(Layer::Source::image(shared, slot), full, sums);
    if constexpr (SENDS_ERRORS_BACK) {
      float* scratch = Layer::Scratch::image(shared, slot) + (KEEPS_ACTIVATED ? 0 : MAPS * FULL_PITCH);
      backward_data(full, Layer::Weights::all(shared), Layer::SourceErrors::image(shared, slot), scratch);
    }
  }

  // sums += this image's share of the gradient of the weights and, as the last term, of the bias.
  static __device__ __forceinline__ void backward_weights(const float* source, const float* full, Accumulators& sums) {
    const int split = own_split(), term0 = first_term();
    if (split >= WEIGHTS_SPLIT_K) return;
    for (int k = split; k < POSITION_K_TILES; k += WEIGHTS_SPLIT_K)
      Split::template multiply<false>(
          sums.tile,
          [&](int m, int row, int pair) -> Pair {
            const int term = term0 + m * 16 + row;
            const float* first = source + term_offset(term);
            const Pair two = {first[position_offset(k * 8 + pair)], first[position_offset(k * 8 + pair + 4)]};
            return term == TERMS ? Pair{1.0f, 1.0f} : two;
          },
          [&](int, int n, int pair, int map) -> Pair {
            const float* delta = full + min(n * 8 + map, MAPS - 1) * FULL_PITCH + k * 8 + pair;
            return {delta[0], delta[4]};
          });
  }

  // The layer's partial sums = weight gradient (MAPS, TERMS), then bias gradient. After stage_gradient and a barrier.
  template <class Context, class Row>
  static __device__ __forceinline__ void store_gradient(Context& c, Row partials) {
    const Row partial = partials + Layer::FIRST_PARTIAL;
    const float* scratch = Layer::Staged::all(c.shared);
    for (int i = threadIdx.x; i < PARAMETERS; i += BLOCK) {
      const int map = i < MAPS * TERMS ? i / TERMS : i - MAPS * TERMS, term = i < MAPS * TERMS ? i % TERMS : TERMS;
      partial[i] = Common::total_of(scratch, map, term);
    }
  }

  // COUNT floats from `from`, whose rows begin at 16-byte boundaries if COUNT is a multiple of 4 and PITCH too.
  template <int COUNT, int PITCH>
  static __device__ __forceinline__ void load_row(float (&row)[COUNT], const float* from) {
    if (COUNT % 4 == 0 && PITCH % 4 == 0) {
      UNROLL_FOR(int x = 0; x < COUNT; x += 4) {
        const Float4 four = *reinterpret_cast<const Float4*>(from + x);
        UNROLL_FOR(int i = 0; i < 4; i++) row[x + i < COUNT ? x + i : 0] = four.at[i];
      }
    } else {
      UNROLL_FOR(int x = 0; x < COUNT; x++) row[x] = from[x];
    }
  }

  // source_errors (SOURCE_SIZE,): each row of a channel is one thread's (or DATA_SPLIT_K threads', who share the maps),
  // which takes the errors of the rows that saw it and pushes each to the KERNEL places it came from, all in registers.
  // The threads of a warp have the same row of different channels, so that the hardware broadcasts the errors. scratch:
  // DATA_SPLIT_K * DATA_PITCH floats if DATA_SPLIT_K > 1.
  static __device__ __forceinline__ void push_rows(const float* full, const float* weights, float* source_errors,
                                                   float* scratch) {
    constexpr int CREW = CHANNELS * DATA_SPLIT_K, ROOM = ceil_div(CREW, 32) * 32;
    constexpr int OWN_MAPS = ceil_div(MAPS, DATA_SPLIT_K);
    for (int job = thread_rank(); job < HEIGHT * ROOM; job += TEAM) {
      const int y = job / ROOM, place = job % ROOM, channel = place % CHANNELS, share = place / CHANNELS;
      if (place >= CREW) continue;
      float error[SHORT_ROWS ? WIDTH : 1];
      UNROLL_FOR(int x = 0; x < WIDTH; x++) error[x] = 0.0f;
      for (int i = 0; i < KERNEL; i++) {
        const int above = y - i;  // first source row of the windows that saw this row with row i of the weights
        if (above < 0 || above % STRIDE || above / STRIDE >= ROWS) continue;
#pragma unroll 4
        for (int n = 0; n < OWN_MAPS; n++) {
          const int map = share * OWN_MAPS + n;
          if (MAPS % DATA_SPLIT_K && map >= MAPS) break;
          float delta[SHORT_ROWS ? COLUMNS : 1], weight[KERNEL];
          load_row<SHORT_ROWS ? COLUMNS : 1, FULL_PITCH>(delta, full + map * FULL_PITCH + above / STRIDE * COLUMNS);
          UNROLL_FOR(int j = 0; j < KERNEL; j++) weight[j] = weights[map * TERMS + (channel * KERNEL + i) * KERNEL + j];
          UNROLL_FOR(int j = 0; j < KERNEL; j++)
            UNROLL_FOR(int x = 0; x < COLUMNS; x++)
              error[(x * STRIDE + j) % WIDTH] = fmaf(delta[x], weight[j], error[(x * STRIDE + j) % WIDTH]);
        }
      }
      float* out = (DATA_SPLIT_K == 1 ? source_errors : scratch + share * DATA_PITCH) + (channel * HEIGHT + y) * WIDTH;
      UNROLL_FOR(int x = 0; x < WIDTH; x++) out[x] = error[x];
    }
    if (DATA_SPLIT_K == 1) return;
    Threads::template team_barrier<Conv>();
    for (int unit = thread_rank(); unit < SOURCE_SIZE; unit += TEAM) {
      float total = scratch[unit];
      UNROLL_FOR(int share = 1; share < DATA_SPLIT_K; share++) total += scratch[share * DATA_PITCH + unit];
      source_errors[unit] = total;
    }
  }

  // Where rows are too long for a thread's registers, each source unit pulls from the units that saw it.
  static __device__ __forceinline__ void pull_units(const float* full, const float* weights, float* source_errors) {
    for (int unit = thread_rank(); unit < SOURCE_SIZE; unit += TEAM) {
      const int channel = unit / (HEIGHT * WIDTH), y = unit / WIDTH % HEIGHT, x = unit % WIDTH;
      float sum = 0.0f;
      for (int i = 0; i < KERNEL; i++) {
        const int row = y - i;
        if (row < 0 || row % STRIDE || row / STRIDE >= ROWS) continue;
        for (int j = 0; j < KERNEL; j++) {
          const int column = x - j;
          if (column < 0 || column % STRIDE || column / STRIDE >= COLUMNS) continue;
          const float* weight = weights + (channel * KERNEL + i) * KERNEL + j;
          const float* delta = full + row / STRIDE * COLUMNS + column / STRIDE;
          for (int map = 0; map < MAPS; map++) sum = fmaf(delta[map * FULL_PITCH], weight[map * TERMS], sum);
        }
      }
      source_errors[unit] = sum;
    }
  }

  static __device__ __forceinline__ void backward_data(const float* full, const float* weights, float* source_errors,
                                                       float* scratch) {
    if (SHORT_ROWS)
      push_rows(full, weights, source_errors, scratch);
    else
      pull_units(full, weights, source_errors);
  }
};

}  // namespace tuned
