// Stage tuned: what the convolutions (conv.cuh, byte_conv.cuh, plane_conv.cuh) share: sizes and what becomes of their
// sums; and, for the first two, the gradient that a block adds up in registers. An image is one team's.
//
// Layer has:
//   CHANNELS, HEIGHT, WIDTH (source), MAPS, KERNEL, STRIDE, ROWS, COLUMNS (of the convolution's sums)
//   FUNCTION (IDENTITY without activation), WINDOW (1 without subsampling), METHOD
//   KEEPS_ACTIVATED: the activated values stay in Full from forward to backward, because a mean over a curved
//   activation needs the slope at every value
// There are three products of matrices; a term is a (channel, i, j):
//   forward            (positions, terms) x (terms, maps)
//   backward_weights   (terms, positions) x (positions, maps)
//   backward_data      (positions, maps) x (maps, terms), without tensor cores
// and how warps share them:
//   FORWARD_M_TILES: tiles of 16 positions that a warp makes together
//   FORWARD_SPLIT_K: warps that share the terms of one sum
//   WEIGHTS_WARPS, WEIGHTS_SPLIT_K: warps that share the terms of the gradient, and the positions it is summed over
//   DATA_SPLIT_K: threads that share the maps of a row of source errors
// Where the arrays lie:
//   FULL_PITCH, GRADIENT_PITCH: floats from a map to the next one in Full, and in Staged
//   GRADIENT_TERMS: terms of the gradient, behind those of a map's weights one for the bias
//   DATA_PITCH: floats from what one of DATA_SPLIT_K threads found to what the next one did
//   Buffers of an image: Source, Target, Winners (bytes), TargetErrors, SourceErrors (NoBuffer: nothing needs them),
//   Full (MAPS, FULL_PITCH), Scratch; and of the block: Weights, Staged
//   SCRATCH_FLOATS, STAGED_FLOATS: how large two of them are
//   FIRST_WEIGHT, FIRST_PARTIAL: where the layer's numbers begin among the parameters, and in a block's partial sums
#pragma once
#include "context.cuh"
#include "../conv.cuh"
#include "reduce.cuh"
#include "tensor.cuh"

namespace tuned {

// The larger, or NaN if one is.
__device__ __forceinline__ float max_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a > b || a != a ? a : b;
#endif
}

// The largest of a window's sums, or NaN if one is; and STEP times which it is: the first of equals, the last of NaN.
template <int STEP = 1, int SIZE>
__device__ __forceinline__ float largest_of_window(const float (&value)[SIZE][SIZE], int& winner) {
  if constexpr (SIZE == 2) {
    const float upper = max_or_nan(value[0][0], value[0][1]), lower = max_or_nan(value[1][0], value[1][1]);
    const float largest = max_or_nan(upper, lower);
    const bool is_upper = upper == largest;
    winner = (is_upper ? 0 : 2 * STEP) + ((is_upper ? value[0][0] : value[1][0]) == largest ? 0 : STEP);
    return largest;
  } else {
    float largest = value[0][0];
    UNROLL_FOR(int i = 1; i < SIZE * SIZE; i++) largest = max_or_nan(largest, value[i / SIZE][i % SIZE]);
    winner = (SIZE * SIZE - 1) * STEP;
    UNROLL_FOR(int i = SIZE * SIZE - 2; i >= 0; i--)
      if (value[i / SIZE][i % SIZE] == largest) winner = i * STEP;
    return largest;
  }
}

// What is added to all sums of a map: one number.
struct BiasOfMap {
  static constexpr bool OF_MAP = true;
  static __device__ __forceinline__ int index(int map, int, int) { return map; }
};

// Where a layer's parameters arrive in shared memory: RawWeights if they are converted, or Weights.
template <class Layer, class = void>
struct Arrival {
  using type = typename Layer::Weights;
};
template <class Layer>
struct Arrival<Layer, std::void_t<typename Layer::RawWeights>> {
  using type = typename Layer::RawWeights;
};

// Sizes, and what becomes of the sums.
template <class Layer, class Threads>
struct ConvSums : LayerDefaults {
  static constexpr int BLOCK = Threads::BLOCK, TEAM = Threads::TEAM, TEAMS = Threads::TEAMS,
                       WARPS = Threads::TEAM_WARPS;
  static constexpr int CHANNELS = Layer::CHANNELS, HEIGHT = Layer::HEIGHT, WIDTH = Layer::WIDTH;
  static constexpr int MAPS = Layer::MAPS, KERNEL = Layer::KERNEL, STRIDE = Layer::STRIDE;
  static constexpr int ROWS = Layer::ROWS, COLUMNS = Layer::COLUMNS;
  static constexpr int FUNCTION = Layer::FUNCTION, WINDOW = Layer::WINDOW, METHOD = Layer::METHOD;
  static constexpr bool KEEPS_ACTIVATED = Layer::KEEPS_ACTIVATED;
  static constexpr int FULL_PITCH = Layer::FULL_PITCH, FORWARD_SPLIT_K = Layer::FORWARD_SPLIT_K;
  static_assert(ROWS == (HEIGHT - KERNEL) / STRIDE + 1 && COLUMNS == (WIDTH - KERNEL) / STRIDE + 1,
                "source includes its border");

  static constexpr int AREA = ROWS * COLUMNS, TERMS = CHANNELS * KERNEL * KERNEL;
  static constexpr int OUT_ROWS = ROWS / WINDOW, OUT_COLUMNS = COLUMNS / WINDOW;
  static constexpr int OUT_AREA = OUT_ROWS * OUT_COLUMNS, TARGET_SIZE = MAPS * OUT_AREA;
  static constexpr int PARAMETERS = MAPS * TERMS + MAPS;
  static constexpr int POSITION_K_TILES = ceil_div(AREA, 8);
  static_assert(FULL_PITCH >= POSITION_K_TILES * 8, "tiles of positions lie within a map");
  static_assert(Layer::SCRATCH_FLOATS >= FORWARD_SPLIT_K * MAPS * FULL_PITCH, "forward's sums lie in Scratch");
  static constexpr bool PAIRED =
      WINDOW % 2 == 0 && COLUMNS % 2 == 0 && FULL_PITCH % 2 == 0;  // a window's rows are Pairs
  static constexpr int PARTIALS = PARAMETERS;

  static __device__ __forceinline__ int thread_rank() { return Threads::thread_rank(); }
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int warp() { return thread_rank() / 32; }

  // Begins to copy weights and bias as they are, from a 16-byte boundary to another: the first lands at `target`.
  template <class Context>
  static __device__ __forceinline__ void copy_parameters(const Context& c, float* target) {
    constexpr int LEAD = Layer::FIRST_WEIGHT % 4;
    copy_float4s(target - LEAD, c.parameters + (Layer::FIRST_WEIGHT - LEAD), ceil_div(LEAD + PARAMETERS, 4));
  }

  // Number i of all partial sums' weights, where it is the layer's, to where the parameters arrive.
  static __device__ __forceinline__ void place_weight(float* shared, int i, float value) {
    const int own = i - Layer::FIRST_PARTIAL;
    if (own >= 0 && own < PARAMETERS) Arrival<Layer>::type::all(shared)[own] = value;
  }

  static __device__ __forceinline__ unsigned char* winners_of(float* shared, int slot) {
    return reinterpret_cast<unsigned char*>(Layer::Winners::image(shared, slot));
  }

  // value += the sums of a window. from: its first
  static __device__ __forceinline__ void add_window(float (&value)[WINDOW][WINDOW], const float* from) {
    UNROLL_FOR(int a = 0; a < WINDOW; a++) {
      if (PAIRED) {
        UNROLL_FOR(int b = 0; b < WINDOW; b += 2) {
          const Pair pair = *reinterpret_cast<const Pair*>(from + a * COLUMNS + b);
          value[a][b] += pair.x;
          value[a][(b + 1) % WINDOW] += pair.y;
        }
      } else {
        UNROLL_FOR(int b = 0; b < WINDOW; b++) value[a][b] += from[a * COLUMNS + b];
      }
    }
  }

  // What the sums become: target (TARGET_SIZE,) and what backward will ask for. scratch (FORWARD_SPLIT_K, MAPS,
  // FULL_PITCH): the sums of each share of the terms. bias (MAPS,), or as Biases has them; the sums are multiplied by
  // `scale`, which is positive, before.
  template <class Biases = BiasOfMap>
  static __device__ __forceinline__ void finish(const float* bias, float* target, unsigned char* winners, float* full,
                                                const float* scratch, float scale = 1.0f) {
    for (int at = thread_rank(); at < TARGET_SIZE; at += TEAM) {
      const int map = at / OUT_AREA, window = at % OUT_AREA;
      const int row = window / OUT_COLUMNS * WINDOW, column = window % OUT_COLUMNS * WINDOW;
      const int corner = window / OUT_COLUMNS * WINDOW * COLUMNS + window % OUT_COLUMNS * WINDOW;
      const auto added = [&](int i) { return bias[Biases::index(map, row + i / WINDOW, column + i % WINDOW)]; };
      float value[WINDOW][WINDOW];
      UNROLL_FOR(int i = 0; i < WINDOW * WINDOW; i++) value[i / WINDOW][i % WINDOW] = 0.0f;
      UNROLL_FOR(int share = 0; share < FORWARD_SPLIT_K; share++)
        add_window(value, scratch + (share * MAPS + map) * FULL_PITCH + corner);
      if (METHOD == MAX) {
        // the functions do not fall, so that the largest sum is the largest value
        if (!Biases::OF_MAP) {
          UNROLL_FOR(int i = 0; i < WINDOW * WINDOW; i++) {
            float& own = value[i / WINDOW][i % WINDOW];
            own = fmaf(own, scale, added(i));
          }
        }
        int winner;
        const float largest = largest_of_window(value, winner);
        target[at] = activate<FUNCTION>(Biases::OF_MAP ? fmaf(largest, scale, added(0)) : largest);
        if (WINDOW > 1) winners[at] = (unsigned char)winner;
        continue;
      }
      UNROLL_FOR(int i = 0; i < WINDOW * WINDOW; i++) {
        float& own = value[i / WINDOW][i % WINDOW];
        own = activate<FUNCTION>(fmaf(own, scale, added(i)));
        if (KEEPS_ACTIVATED) full[map * FULL_PITCH + corner + i / WINDOW * COLUMNS + i % WINDOW] = own;
      }
      int winner;
      target[at] = subsample_window<METHOD>(value, &winner);
    }
  }

  // Second phase: the sum of all blocks' partial sums.
  static constexpr int TILES = ceil_div(PARAMETERS, PARTIALS_TILE);
  static constexpr PartialsSizes PARTIALS_SIZES = {Layer::FIRST_PARTIAL, Layer::FIRST_WEIGHT, PARAMETERS};
};

// A gradient in tiles of floats, split where they are multiplied.
template <class Layer, class Threads>
struct ConvCommon : ConvSums<Layer, Threads> {
  using Sums = ConvSums<Layer, Threads>;
  using Sums::AREA, Sums::COLUMNS, Sums::FULL_PITCH, Sums::FUNCTION, Sums::KEEPS_ACTIVATED, Sums::MAPS, Sums::METHOD,
      Sums::OUT_AREA, Sums::OUT_COLUMNS, Sums::PAIRED, Sums::POSITION_K_TILES, Sums::TARGET_SIZE, Sums::TEAM,
      Sums::TEAMS, Sums::TERMS, Sums::thread_rank, Sums::WARPS, Sums::WINDOW;
  static constexpr int FORWARD_M_TILES = Layer::FORWARD_M_TILES, GRADIENT_PITCH = Layer::GRADIENT_PITCH;
  static constexpr int WEIGHTS_WARPS = Layer::WEIGHTS_WARPS, WEIGHTS_SPLIT_K = Layer::WEIGHTS_SPLIT_K;
  static constexpr int N_TILES = ceil_div(MAPS, 8);
  static constexpr int POSITION_TILES = ceil_div(AREA, 16);
  // Behind the weights' terms the bias is one, which is always 1.
  static constexpr int GRADIENT_TERMS = Layer::GRADIENT_TERMS, TERM_TILES = ceil_div(GRADIENT_TERMS, 16);
  static constexpr int OWN_TILES = ceil_div(TERM_TILES, WEIGHTS_WARPS);
  static_assert(WEIGHTS_WARPS * WEIGHTS_SPLIT_K <= WARPS, "each warp has one share of the gradient");
  static_assert(GRADIENT_TERMS > TERMS && GRADIENT_PITCH >= GRADIENT_TERMS,
                "a map's gradient has a place for its bias");
  static_assert(Layer::STAGED_FLOATS >= TEAMS * WEIGHTS_SPLIT_K * N_TILES * 8 * GRADIENT_PITCH,
                "every share of the gradient has a place in Staged");

  // A warp's share of the gradient, (terms, maps).
  struct Accumulators {
    Fragment tile[OWN_TILES][N_TILES];
  };
  static __device__ __forceinline__ void clear(Accumulators& sums) { ::clear(sums.tile); }

  // The first term of the calling warp's share, and which part of the positions it sums; beyond WEIGHTS_SPLIT_K it has
  // none.
  static __device__ __forceinline__ int first_term() { return thread_rank() / 32 % WEIGHTS_WARPS * OWN_TILES * 16; }
  static __device__ __forceinline__ int own_split() { return thread_rank() / 32 / WEIGHTS_WARPS; }

  // scratch (MAPS, FULL_PITCH) = a warp's sums of the positions from position0 on
  static __device__ __forceinline__ void store_sums(const Fragment (&sum)[FORWARD_M_TILES][N_TILES], int position0,
                                                    float* scratch) {
    UNROLL_FOR(int m = 0; m < FORWARD_M_TILES; m++)
      UNROLL_FOR(int n = 0; n < N_TILES; n++)
        UNROLL_FOR(int i = 0; i < 4; i++) {
          const int position = position0 + m * 16 + tile_row(i), map = n * 8 + tile_column(i);
          if ((AREA % (FORWARD_M_TILES * 16) == 0 || position < AREA) && (MAPS % 8 == 0 || map < MAPS))
            scratch[map * FULL_PITCH + position] = sum[m][n].at[i];
        }
  }

  // Staged (TEAMS, WEIGHTS_SPLIT_K, N_TILES * 8, GRADIENT_PITCH) = every warp's share of the gradient, of every team.
  template <class Context>
  static __device__ __forceinline__ void stage_gradient(Context& c, const Accumulators& sums) {
    float* scratch = Layer::Staged::all(c.shared);
    if (own_split() < WEIGHTS_SPLIT_K) {
      float* own = scratch + (Threads::team() * WEIGHTS_SPLIT_K + own_split()) * N_TILES * 8 * GRADIENT_PITCH;
      UNROLL_FOR(int m = 0; m < OWN_TILES; m++)
        UNROLL_FOR(int n = 0; n < N_TILES; n++)
          UNROLL_FOR(int i = 0; i < 4; i++) {
            const int term = first_term() + m * 16 + tile_row(i), map = n * 8 + tile_column(i);
            if (term < GRADIENT_TERMS) own[map * GRADIENT_PITCH + term] = sums.tile[m][n].at[i];
          }
    }
  }

  // The gradient of a map's term, all shares of it.
  static __device__ __forceinline__ float total_of(const float* scratch, int map, int term) {
    float total = 0.0f;
    UNROLL_FOR(int share = 0; share < TEAMS * WEIGHTS_SPLIT_K; share++)
      total += scratch[(share * N_TILES * 8 + map) * GRADIENT_PITCH + term];
    return total;
  }

  // full (MAPS, AREA) = derivative of the loss by the convolution's sums: the target's errors (TARGET_SIZE,), each at
  // the place in its window that it belongs to.
  static __device__ __forceinline__ void unpool(const float* target, const unsigned char* winners, const float* errors,
                                                float* full) {
    for (int at = thread_rank(); at < TARGET_SIZE; at += TEAM) {
      const int map = at / OUT_AREA, window = at % OUT_AREA;
      const int y = window / OUT_COLUMNS * WINDOW, x = window % OUT_COLUMNS * WINDOW;
      const float error = errors[at];
      // for max the target is the winner's own activated value; the losers' derivatives are not needed
      const float winning = WINDOW > 1 && METHOD == MEAN ? 0.0f : error * slope<FUNCTION>(target[at]);
      const int winner = WINDOW > 1 && METHOD == MAX ? winners[at] : 0;
      UNROLL_FOR(int a = 0; a < WINDOW; a++) {
        float* row = full + map * FULL_PITCH + (y + a) * COLUMNS + x;
        const auto value = [&](int b) {
          if (WINDOW > 1 && METHOD == MEAN)
            return error / float(WINDOW * WINDOW) * (KEEPS_ACTIVATED ? slope<FUNCTION>(row[b]) : 1.0f);
          return a * WINDOW + b == winner ? winning : 0.0f;
        };
        if (PAIRED) {
          UNROLL_FOR(int b = 0; b < WINDOW; b += 2) *reinterpret_cast<Pair*>(row + b) = {value(b), value(b + 1)};
        } else {
          UNROLL_FOR(int b = 0; b < WINDOW; b++) row[b] = value(b);
        }
      }
    }
    constexpr int REST = POSITION_K_TILES * 8 - AREA;
    for (int i = thread_rank(); i < MAPS * REST; i += TEAM)
      full[i / max(1, REST) * FULL_PITCH + AREA + i % max(1, REST)] = 0.0f;
  }
};

}  // namespace tuned
