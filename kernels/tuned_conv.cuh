// Stage tuned: convolution + bias + activation + subsampling of one image by one team, all in shared memory, as products
// of matrices: (positions, terms) x (terms, maps) forward, (terms, positions) x (positions, maps) for the weights'
// gradient, where a term is a (channel, i, j).
// Needs: CHANNELS, HEIGHT, WIDTH (source), MAPS, KERNEL, STRIDE, ROWS, COLUMNS (of the convolution), FUNCTION
// (IDENTITY without activation), WINDOW (1 without subsampling), METHOD, KEEPS (the activated values stay in `full` from
// forward to backward), FULL_PITCH (floats from a map to the next one in `full`), DOWN (tiles of positions a warp makes
// together), SHARES (warps that share the terms of one such sum), GROUPS and SPLITS (of warps, for the weights' gradient:
// GROUPS share its terms, SPLITS the positions), SENDERS (threads that share the maps of one row of source errors),
// SENDER_PITCH (floats from what one of these has to say to the next), BLOCK (threads of a block), TEAM (of a team).
// Every function is called by all threads of the team, between barriers of it that the caller places.
#include "tuned_maps.cuh"

constexpr int SOURCE_SIZE = CHANNELS * HEIGHT * WIDTH;
constexpr int TERM_EIGHTS = (TERMS + 7) / 8;
constexpr bool SHORT_ROWS = COLUMNS <= 32 && WIDTH <= 32;  // a row fits a thread's registers

// From a position's first source unit to that of a term; a term there is none of may be any (its weight is 0).
__device__ __forceinline__ int term_place(int term) {
  if (term >= TERMS) return 0;
  return (term / (KERNEL * KERNEL) * HEIGHT + term / KERNEL % KERNEL) * WIDTH + term % KERNEL;
}

// places (TERM_EIGHTS * 8,): of every term, since to work it out takes longer than to look it up.
__device__ __forceinline__ void prepare(float* places) {
  for (int term = threadIdx.x; term < TERM_EIGHTS * 8; term += BLOCK)
    reinterpret_cast<int*>(places)[term] = term_place(term);
}

// A position's first source unit, in channel 0.
__device__ __forceinline__ int position_place(int position) {
  const int at = min(position, AREA - 1);
  return (at / COLUMNS * WIDTH + at % COLUMNS) * STRIDE;
}

// source (SOURCE_SIZE,) -> target (TARGET_SIZE,). held: weight (MAPS, TERMS), then bias (MAPS,). places: see prepare.
// scratch: SHARES * MAPS * FULL_PITCH floats.
__device__ __forceinline__ void forward(const float* source, const float* held, float* target,
                                        unsigned char* winners, float* full, float* scratch, const float* places) {
  const int* term_at = reinterpret_cast<const int*>(places);
  constexpr int TASKS = (POSITION_TILES + DOWN - 1) / DOWN;
  for (int task = thread_rank() / 32; task < TASKS * SHARES; task += WARPS) {
    const int share = task / TASKS, position0 = task % TASKS * DOWN * 16;
    Fragment sum[DOWN][ACROSS];
    clear(sum);
#pragma unroll 2
    for (int eight = share; eight < TERM_EIGHTS; eight += SHARES)
      mma_3xtf32<false>(
          sum,
          [&](int m, int row, int pair) -> Pair {
            const float* corner = source + position_place(position0 + m * 16 + row);
            return {corner[term_at[eight * 8 + pair]], corner[term_at[eight * 8 + pair + 4]]};
          },
          [&](int, int n, int pair, int map) -> Pair {
            const float* weight = held + min(n * 8 + map, MAPS - 1) * TERMS + eight * 8 + pair;
            return {eight * 8 + pair < TERMS ? weight[0] : 0.0f, eight * 8 + pair + 4 < TERMS ? weight[4] : 0.0f};
          });
    put_sums(sum, position0, scratch + share * MAPS * FULL_PITCH);
  }
  team_barrier();
  finish(held + MAPS * TERMS, target, winners, full, scratch);
}

// sums += this image's share of the gradient of the weights and, as the last term, of the bias.
__device__ __forceinline__ void add_gradient(const float* source, const float* full, Sums& sums) {
  const int split = own_split(), term0 = first_term();
  if (split >= SPLITS) return;
  for (int eight = split; eight < AREA_EIGHTS; eight += SPLITS)
    mma_3xtf32<false>(
        sums.tile,
        [&](int m, int row, int pair) -> Pair {
          const int term = term0 + m * 16 + row;
          const float* first = source + term_place(term);
          const Pair two = {first[position_place(eight * 8 + pair)], first[position_place(eight * 8 + pair + 4)]};
          return term == TERMS ? Pair{1.0f, 1.0f} : two;
        },
        [&](int, int n, int pair, int map) -> Pair {
          const float* delta = full + min(n * 8 + map, MAPS - 1) * FULL_PITCH + eight * 8 + pair;
          return {delta[0], delta[4]};
        });
}

// partial (PARAMETERS,) = weight gradient (MAPS, TERMS), then bias gradient.
// scratch: as put_gradient left it, and a barrier after that. All threads of the block.
__device__ __forceinline__ void write_gradient(const float* scratch, float* partial) {
  for (int i = threadIdx.x; i < PARAMETERS; i += BLOCK) {
    const int map = i < MAPS * TERMS ? i / TERMS : i - MAPS * TERMS, term = i < MAPS * TERMS ? i % TERMS : TERMS;
    partial[i] = total_of(scratch, map, term);
  }
}

// COUNT floats from `from`, whose rows begin at 16-byte boundaries if COUNT is a multiple of 4 and PITCH too.
template <int COUNT, int PITCH>
__device__ __forceinline__ void load_row(float (&row)[COUNT], const float* from) {
  if (COUNT % 4 == 0 && PITCH % 4 == 0) {
UNROLL
    for (int x = 0; x < COUNT; x += 4) {
      const Float4 quad = *reinterpret_cast<const Float4*>(from + x);
UNROLL
      for (int i = 0; i < 4; i++) row[x + i < COUNT ? x + i : 0] = quad.at[i];
    }
  } else {
UNROLL
    for (int x = 0; x < COUNT; x++) row[x] = from[x];
  }
}

// source_errors (SOURCE_SIZE,): each row of a channel is one thread's (or SENDERS threads', who share the maps), which
// takes the errors of the rows that saw it and pushes each to the KERNEL places it came from, all in registers. The
// threads of a warp have the same row of different channels, so that the hardware broadcasts the errors.
// scratch: SENDERS * SENDER_PITCH floats if SENDERS > 1.
__device__ __forceinline__ void send_rows_back(const float* full, const float* held, float* source_errors,
                                               float* scratch) {
  constexpr int CREW = CHANNELS * SENDERS, ROOM = (CREW + 31) / 32 * 32;
  constexpr int MAPS_EACH = (MAPS + SENDERS - 1) / SENDERS;
  for (int job = thread_rank(); job < HEIGHT * ROOM; job += TEAM) {
    const int y = job / ROOM, place = job % ROOM, channel = place % CHANNELS, sender = place / CHANNELS;
    if (place >= CREW) continue;
    float error[SHORT_ROWS ? WIDTH : 1];
UNROLL
    for (int x = 0; x < WIDTH; x++) error[x] = 0.0f;
    for (int i = 0; i < KERNEL; i++) {
      const int above = y - i;  // first source row of the windows that saw this row with row i of the weights
      if (above < 0 || above % STRIDE || above / STRIDE >= ROWS) continue;
#pragma unroll 4
      for (int n = 0; n < MAPS_EACH; n++) {
        const int map = sender * MAPS_EACH + n;
        if (MAPS % SENDERS && map >= MAPS) break;
        float delta[SHORT_ROWS ? COLUMNS : 1], weight[KERNEL];
        load_row<SHORT_ROWS ? COLUMNS : 1, FULL_PITCH>(delta, full + map * FULL_PITCH + above / STRIDE * COLUMNS);
UNROLL
        for (int j = 0; j < KERNEL; j++) weight[j] = held[map * TERMS + (channel * KERNEL + i) * KERNEL + j];
UNROLL
        for (int j = 0; j < KERNEL; j++)
UNROLL
          for (int x = 0; x < COLUMNS; x++)
            error[(x * STRIDE + j) % WIDTH] = fmaf(delta[x], weight[j], error[(x * STRIDE + j) % WIDTH]);
      }
    }
    float* out = (SENDERS == 1 ? source_errors : scratch + sender * SENDER_PITCH) + (channel * HEIGHT + y) * WIDTH;
UNROLL
    for (int x = 0; x < WIDTH; x++) out[x] = error[x];
  }
  if (SENDERS == 1) return;
  team_barrier();
  for (int unit = thread_rank(); unit < SOURCE_SIZE; unit += TEAM) {
    float total = scratch[unit];
UNROLL
    for (int sender = 1; sender < SENDERS; sender++) total += scratch[sender * SENDER_PITCH + unit];
    source_errors[unit] = total;
  }
}

// The same where rows are too long for that: each source unit gathers from the units that saw it.
__device__ __forceinline__ void gather_errors(const float* full, const float* held, float* source_errors) {
  for (int unit = thread_rank(); unit < SOURCE_SIZE; unit += TEAM) {
    const int channel = unit / (HEIGHT * WIDTH), y = unit / WIDTH % HEIGHT, x = unit % WIDTH;
    float sum = 0.0f;
    for (int i = 0; i < KERNEL; i++) {
      const int row = y - i;
      if (row < 0 || row % STRIDE || row / STRIDE >= ROWS) continue;
      for (int j = 0; j < KERNEL; j++) {
        const int column = x - j;
        if (column < 0 || column % STRIDE || column / STRIDE >= COLUMNS) continue;
        const float* weight = held + (channel * KERNEL + i) * KERNEL + j;
        const float* delta = full + row / STRIDE * COLUMNS + column / STRIDE;
        for (int map = 0; map < MAPS; map++) sum = fmaf(delta[map * FULL_PITCH], weight[map * TERMS], sum);
      }
    }
    source_errors[unit] = sum;
  }
}

__device__ __forceinline__ void send_back(const float* full, const float* held, float* source_errors,
                                          float* scratch) {
  if (SHORT_ROWS)
    send_rows_back(full, held, source_errors, scratch);
  else
    gather_errors(full, held, source_errors);
}
