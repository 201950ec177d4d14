// Stage tuned: what convolutions do with their sums, whatever they are sums of: part of tuned_conv.cuh and
// tuned_first.cuh, which say what it needs.
#include "conv.cuh"
#include "tensor.cuh"

constexpr int WARPS = TEAM / 32;
constexpr int AREA = ROWS * COLUMNS, TERMS = CHANNELS * KERNEL * KERNEL;
constexpr int OUT_ROWS = ROWS / WINDOW, OUT_COLUMNS = COLUMNS / WINDOW;
constexpr int OUT_AREA = OUT_ROWS * OUT_COLUMNS, TARGET_SIZE = MAPS * OUT_AREA;
constexpr int PARAMETERS = MAPS * TERMS + MAPS;
constexpr int ACROSS = (MAPS + 7) / 8;  // tiles of maps
constexpr int AREA_EIGHTS = (AREA + 7) / 8;
constexpr int POSITION_TILES = (AREA + 15) / 16, TERM_TILES = (TERMS + 1 + 15) / 16;  // the bias is a term, always 1
constexpr int OWN_TILES = (TERM_TILES + GROUPS - 1) / GROUPS;
constexpr int GRADIENT_PITCH = TERM_TILES * 16 + 4;

// A warp's share of the gradient, (terms, maps), kept in registers over all images of a step.
struct Sums {
  Fragment tile[OWN_TILES][ACROSS];
};

__device__ __forceinline__ void clear(Sums& sums) { ::clear(sums.tile); }

// The first term of the calling warp's share, and which part of the positions it sums; beyond SPLITS it has none.
__device__ __forceinline__ int first_term() { return thread_rank() / 32 % GROUPS * OWN_TILES * 16; }
__device__ __forceinline__ int own_split() { return thread_rank() / 32 / GROUPS; }

// scratch (MAPS, FULL_PITCH) = a warp's sums of the positions from position0 on
__device__ __forceinline__ void put_sums(const Fragment (&sum)[DOWN][ACROSS], int position0, float* scratch) {
UNROLL
  for (int m = 0; m < DOWN; m++)
UNROLL
    for (int n = 0; n < ACROSS; n++)
UNROLL
      for (int i = 0; i < 4; i++) {
        const int position = position0 + m * 16 + tile_row(i), map = n * 8 + tile_column(i);
        if ((AREA % (DOWN * 16) == 0 || position < AREA) && (MAPS % 8 == 0 || map < MAPS))
          scratch[map * FULL_PITCH + position] = sum[m][n].at[i];
      }
}

// scratch (TEAMS, SPLITS, ACROSS * 8, GRADIENT_PITCH) = every warp's share of the gradient, of every team.
__device__ __forceinline__ void put_gradient(const Sums& sums, float* scratch) {
  if (own_split() < SPLITS) {
    float* own = scratch + (team() * SPLITS + own_split()) * ACROSS * 8 * GRADIENT_PITCH;
UNROLL
    for (int m = 0; m < OWN_TILES; m++)
UNROLL
      for (int n = 0; n < ACROSS; n++)
UNROLL
        for (int i = 0; i < 4; i++) {
          const int term = first_term() + m * 16 + tile_row(i), map = n * 8 + tile_column(i);
          if (term <= TERMS) own[map * GRADIENT_PITCH + term] = sums.tile[m][n].at[i];
        }
  }
}

// The gradient of a map's term, all shares of it.
__device__ __forceinline__ float total_of(const float* scratch, int map, int term) {
  float total = 0.0f;
UNROLL
  for (int share = 0; share < TEAMS * SPLITS; share++)
    total += scratch[(share * ACROSS * 8 + map) * GRADIENT_PITCH + term];
  return total;
}

constexpr bool PAIRED = WINDOW % 2 == 0 && COLUMNS % 2 == 0 && FULL_PITCH % 2 == 0;  // a window's rows are whole Twos

// The larger, or NaN if one is.
__device__ __forceinline__ float larger(float a, float b) {
#ifdef __CUDA_ARCH__
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a > b || a != a ? a : b;
#endif
}

// value += the sums of a window. from: its first
__device__ __forceinline__ void add_window(float (&value)[WINDOW][WINDOW], const float* from) {
UNROLL
  for (int a = 0; a < WINDOW; a++) {
    if (PAIRED) {
UNROLL
      for (int b = 0; b < WINDOW; b += 2) {
        const Pair two = *reinterpret_cast<const Pair*>(from + a * COLUMNS + b);
        value[a][b] += two.x;
        value[a][(b + 1) % WINDOW] += two.y;
      }
    } else {
UNROLL
      for (int b = 0; b < WINDOW; b++) value[a][b] += from[a * COLUMNS + b];
    }
  }
}

// What the sums become: target (TARGET_SIZE,) and what backward will ask for. scratch (SHARES, MAPS, FULL_PITCH): the
// sums of each share of the terms. bias (MAPS,); the sums are multiplied by `scale`, which is positive, before.
__device__ __forceinline__ void finish(const float* bias, float* target, unsigned char* winners, float* full,
                                       const float* scratch, float scale = 1.0f) {
  for (int at = thread_rank(); at < TARGET_SIZE; at += TEAM) {
    const int map = at / OUT_AREA, window = at % OUT_AREA;
    const int corner = window / OUT_COLUMNS * WINDOW * COLUMNS + window % OUT_COLUMNS * WINDOW;
    float value[WINDOW][WINDOW];
UNROLL
    for (int i = 0; i < WINDOW * WINDOW; i++) value[i / WINDOW][i % WINDOW] = 0.0f;
UNROLL
    for (int share = 0; share < SHARES; share++)
      add_window(value, scratch + (share * MAPS + map) * FULL_PITCH + corner);
    if (METHOD == MAX) {
      // the functions do not fall, so that the largest sum is the largest value
      float largest = value[0][0];
UNROLL
      for (int i = 1; i < WINDOW * WINDOW; i++) largest = larger(largest, value[i / WINDOW][i % WINDOW]);
      target[at] = activate<FUNCTION>(fmaf(largest, scale, bias[map]));
      if (WINDOW == 1) continue;
      int winner = WINDOW * WINDOW - 1;
UNROLL
      for (int i = WINDOW * WINDOW - 2; i >= 0; i--)
        if (value[i / WINDOW][i % WINDOW] == largest) winner = i;
      winners[at] = (unsigned char)winner;
      continue;
    }
UNROLL
    for (int i = 0; i < WINDOW * WINDOW; i++) {
      float& own = value[i / WINDOW][i % WINDOW];
      own = activate<FUNCTION>(fmaf(own, scale, bias[map]));
      if (KEEPS) full[map * FULL_PITCH + corner + i / WINDOW * COLUMNS + i % WINDOW] = own;
    }
    int winner;
    target[at] = subsample_window<WINDOW, METHOD>(value, &winner);
  }
}

// full (MAPS, AREA) = derivative of the loss by the convolution's sums; errors (TARGET_SIZE,) are the target's.
__device__ __forceinline__ void spread(const float* target, const unsigned char* winners, const float* errors,
                                       float* full) {
  for (int at = thread_rank(); at < TARGET_SIZE; at += TEAM) {
    const int map = at / OUT_AREA, window = at % OUT_AREA;
    const int y = window / OUT_COLUMNS * WINDOW, x = window % OUT_COLUMNS * WINDOW;
    const float error = errors[at];
    // for max the target is the winner's own activated value; the losers' derivatives are not needed
    const float winning = WINDOW > 1 && METHOD == MEAN ? 0.0f : error * slope<FUNCTION>(target[at]);
    const int winner = WINDOW > 1 && METHOD == MAX ? winners[at] : 0;
UNROLL
    for (int a = 0; a < WINDOW; a++) {
      float* row = full + map * FULL_PITCH + (y + a) * COLUMNS + x;
      const auto value = [&](int b) {
        if (WINDOW > 1 && METHOD == MEAN)
          return error / float(WINDOW * WINDOW) * (KEEPS ? slope<FUNCTION>(row[b]) : 1.0f);
        return a * WINDOW + b == winner ? winning : 0.0f;
      };
      if (PAIRED) {
UNROLL
        for (int b = 0; b < WINDOW; b += 2) *reinterpret_cast<Pair*>(row + b) = {value(b), value(b + 1)};
      } else {
UNROLL
        for (int b = 0; b < WINDOW; b++) row[b] = value(b);
      }
    }
  }
  constexpr int REST = AREA_EIGHTS * 8 - AREA;
  for (int i = thread_rank(); i < MAPS * REST; i += TEAM) full[i / max(1, REST) * FULL_PITCH + AREA + i % max(1, REST)] = 0.0f;
}
