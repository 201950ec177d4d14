// Products of matrices out of shared memory with float32 accuracy, in one of four arithmetics.
//
// What is multiplied lies in shared memory as vectors of eight neighbouring numbers. Tensor cores multiply numbers of 8
// (BF16) or 11 (F16) significant bits, so a float is split, once, when it is staged: a plane of vectors has the floats
// rounded to such numbers, and the next one what the rounding left (H. Ootomo and R. Yokota, "Recovering single precision
// accuracy from Tensor Cores while surpassing the FP32 theoretical peak performance", IJHPCA 36, 2022).
//   FFMA    floats, multiplied by the ordinary units; what every device can do
//   TF32X3  floats, split by mma_3xtf32 whenever they are used
//   BF16X6  three planes, which hold all 24 bits at a float's whole range; the six largest of nine products
//   F16X3   two planes, the second one 2^11 times as large as what it stands for, and the three largest of four products.
//           F16 ends at 65504, and its numbers below 2^-14 lose bits. Hence the factors of Range below: what is larger than
//           they allow becomes infinite, and so NaN in the sums, which is seen; what is 2^-26 of the largest number still
//           has 22 bits, and what is smaller loses one with each power of two.
// An infinity leaves NaN in a second plane, and NaN stays NaN: nothing that went wrong is hidden.
#pragma once
#include "../../layers.cuh"
#include "../../planes.cuh"
#include "../../tensor.cuh"

enum Arithmetic { FFMA, TF32X3, BF16X6, F16X3 };

namespace graph {

constexpr int WARP = 32;
constexpr int EIGHT = 8;    // numbers of a vector
constexpr int K_STEP = 16;  // terms of one step of a product: two vectors

// The arithmetic that takes the place of `wanted` where a device lacks it: BF16 and TF32 came with compute capability 8.0,
// F16 with 7.5 (in products of eight terms). An emulated device multiplies floats.
constexpr int made_of(int wanted) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return wanted;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750
  return wanted == F16X3 ? F16X3 : FFMA;
#elif defined(EMULATED_TENSOR_CORES)
  return wanted;
#else
  return wanted == FFMA ? wanted : FFMA;
#endif
}

struct Eight {
  float at[EIGHT];
};

struct alignas(16) Words4 {
  unsigned at[4];
};

// Powers of two that bring numbers into the range of F16, and back. Weights up to 2^12 and maps up to 2^22 in absolute
// value are taken; errors have a factor by their own largest one, which peak_factor gives.
struct Range {
  static constexpr float WEIGHTS = 16.0f, MAPS = 1.0f / 64.0f;
};

// The least power of two that is not below x.
__host__ __device__ constexpr float power_above(float x) {
  float power = 1.0f;
  while (power < x) power *= 2.0f;
  return power;
}

// The power of two that brings the largest of some errors to [2^12, 2^13): slopes of up to 1.15 may still come. `bits` are those of the largest absolute value (which sort as the values do). Without any error, or
// where one is infinite or NaN, it is 1.
__device__ __forceinline__ float peak_factor(unsigned bits) {
  const int exponent = static_cast<int>(bits >> 23);
  if (exponent == 0 || exponent == 255) return 1.0f;
  return __int_as_float(min(254, max(1, 127 + 12 + 127 - exponent)) << 23);
}

// How the numbers of an arithmetic lie in shared memory.
template <int ARITHMETIC>
struct Planes {
  static constexpr bool SPLIT = ARITHMETIC == BF16X6 || ARITHMETIC == F16X3;
  static constexpr int COUNT = ARITHMETIC == BF16X6 ? 3 : ARITHMETIC == F16X3 ? 2 : 1;
  static constexpr int VECTOR_BYTES = SPLIT ? 16 : 32;

  // Eight numbers as they are stored: a word has one of them, or two neighbours' part of a plane.
  struct Words {
    static constexpr int COUNT = SPLIT ? Planes::COUNT : 2;
    Words4 at[COUNT];

    // The same, with zeros for numbers that are not kept.
    __device__ __forceinline__ Words kept(const bool (&keeps)[EIGHT]) const {
      Words words;
      UNROLL_FOR(int p = 0; p < COUNT; p++)
        UNROLL_FOR(int n = 0; n < 4; n++) {
          const int first = SPLIT ? n * 2 : p * 4 + n;
          const unsigned mask = SPLIT ? (keeps[first] ? 0xffffu : 0) | (keeps[first + 1] ? 0xffff0000u : 0)
                                      : (keeps[first] ? 0xffffffffu : 0);
          words.at[p].at[n] = at[p].at[n] & mask;
        }
      return words;
    }
  };

  // `factor` (a power of two, used by F16X3 alone) times these numbers.
  static __device__ __forceinline__ Words words_of(const Eight& numbers, float factor);

  // Vector `index` of a region of `vectors` becomes these numbers.
  static __device__ __forceinline__ void store(char* region, int vectors, int index, const Words& words) {
    UNROLL_FOR(int p = 0; p < Words::COUNT; p++) {
      const Words4& own = words.at[p];
      if constexpr (SPLIT) {
        *reinterpret_cast<Words4*>(region + (p * vectors + index) * VECTOR_BYTES) = own;
      } else {
        Float4 four;
        UNROLL_FOR(int n = 0; n < 4; n++) four.at[n] = __int_as_float(static_cast<int>(own.at[n]));
        *(reinterpret_cast<Float4*>(region + index * VECTOR_BYTES) + p) = four;
      }
    }
  }
  static __device__ __forceinline__ void store(char* region, int vectors, int index, const Eight& numbers,
                                               float factor) {
    store(region, vectors, index, words_of(numbers, factor));
  }
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750 || defined(EMULATED_TENSOR_CORES)
#define HAS_PLANES 1
#endif

#if defined(EMULATED_TENSOR_CORES) && !defined(__CUDACC__)
inline void mma_bf16(Fragment& sum, const unsigned (&left)[4], const unsigned (&right)[2]) {
  emulated::multiply_matrices(sum.at, left, right, emulated::bf16_to_float);
}
#endif

template <int ARITHMETIC>
__device__ __forceinline__
    typename Planes<ARITHMETIC>::Words Planes<ARITHMETIC>::words_of(const Eight& numbers, float factor) {
  Words found;
  if constexpr (!SPLIT) {
    UNROLL_FOR(int n = 0; n < EIGHT; n++)
      found.at[n / 4].at[n % 4] = static_cast<unsigned>(__float_as_int(numbers.at[n]));
  } else {
    UNROLL_FOR(int n = 0; n < EIGHT / 2; n++) {
      const Pair two = {numbers.at[n * 2], numbers.at[n * 2 + 1]};
      unsigned words[COUNT];
#if HAS_PLANES
      if constexpr (ARITHMETIC == F16X3) split_fp16(two.x * factor, two.y * factor, words[0], words[1]);
#endif
      if constexpr (ARITHMETIC == BF16X6) split_bf16x3(two, words);
      UNROLL_FOR(int p = 0; p < COUNT; p++) found.at[p].at[n] = words[p];
    }
  }
  return found;
}

// A warp's sums: M_TILES x N_TILES tiles of 16 x 8. The products of second and third planes are summed apart.
template <int ARITHMETIC, int M_TILES, int N_TILES>
struct Sums {
  Fragment large[M_TILES][N_TILES], small[M_TILES][N_TILES];

  __device__ __forceinline__ void set_zero() {
    clear(large);
    clear(small);
  }

  // Element i of a tile; `factor` undoes those of both sides.
  __device__ __forceinline__ float result(int m, int n, int i, float factor) const {
    if (ARITHMETIC == F16X3) return fmaf(small[m][n].at[i], 1.0f / REST, large[m][n].at[i]) * factor;
    return ARITHMETIC == BF16X6 ? large[m][n].at[i] + small[m][n].at[i] : large[m][n].at[i];
  }
};

#if HAS_PLANES

// sums += left x right over K_STEP terms, out of planes. left[m] and right[pair of tiles] are the addresses of this lane's
// rows in the first plane; *_plane are the bytes from one plane to the next, *_offset those that all lanes go further.
// TRANSPOSED: a vector has neighbours of M or N, not of the terms.
template <bool TRANSPOSED, int ARITHMETIC, int M_TILES, int N_TILES>
__device__ __forceinline__ void multiply_planes(Sums<ARITHMETIC, M_TILES, N_TILES>& sums,
                                                const SharedAddress (&left)[M_TILES], int left_offset, int left_plane,
                                                const SharedAddress (&right)[(N_TILES + 1) / 2], int right_offset,
                                                int right_plane) {
  constexpr int COUNT = Planes<ARITHMETIC>::COUNT;
  // More than four tiles of rows are loaded one at a time: all of them would take registers that the sums need.
  constexpr int ROWS = M_TILES > 4 ? 1 : M_TILES;
  static_assert(ROWS == M_TILES || N_TILES <= 2, "rows are loaded once");
  unsigned rows[COUNT][ROWS][4];
  const auto load_rows = [&](int first) {
    UNROLL_FOR(int p = 0; p < COUNT; p++)
      UNROLL_FOR(int m = 0; m < ROWS; m++)
        load_matrices<TRANSPOSED>(rows[p][m], left[first + m] + left_offset + p * left_plane);
  };
  if (ROWS == M_TILES) load_rows(0);
  // Two tiles of columns at a time, for the same reason.
  UNROLL_FOR(int pair = 0; pair < N_TILES; pair += 2) {
    unsigned columns[COUNT][2][2];
    UNROLL_FOR(int p = 0; p < COUNT; p++) {
      const SharedAddress address = right[pair / 2] + right_offset + p * right_plane;
      if (pair + 1 < N_TILES) {
        unsigned both[4];
        load_matrices<TRANSPOSED>(both, address);
        columns[p][0][0] = both[0], columns[p][0][1] = both[1], columns[p][1][0] = both[2], columns[p][1][1] = both[3];
      } else {
        load_matrices<TRANSPOSED>(columns[p][0], address);
      }
    }
    // the smallest products first; those that wait for each other are as far apart as can be
    UNROLL_FOR(int first = 0; first < M_TILES; first += ROWS) {
      if (ROWS < M_TILES) load_rows(first);
      UNROLL_FOR(int order = COUNT - 1; order >= 0; order--)
        UNROLL_FOR(int p = 0; p <= order; p++)
          UNROLL_FOR(int m = 0; m < ROWS; m++)
            UNROLL_FOR(int n = 0; n < 2; n++) {
              if (pair + n >= N_TILES) continue;
              Fragment& sum = order == 0 ? sums.large[first + m][pair + n] : sums.small[first + m][pair + n];
              if constexpr (ARITHMETIC == BF16X6)
                mma_bf16(sum, rows[p][m], columns[order - p][n]);
              else
                mma_fp16(sum, rows[p][m], columns[order - p][n]);
            }
    }
  }
}

#endif

// The same for floats: left(m, row, k) and right(n, column, k) are numbers of a tile, k < K_STEP.
template <int ARITHMETIC, int M_TILES, int N_TILES, class Left, class Right>
__device__ __forceinline__ void multiply_floats(Sums<ARITHMETIC, M_TILES, N_TILES>& sums, Left left, Right right) {
  if constexpr (ARITHMETIC == TF32X3) {
    UNROLL_FOR(int k = 0; k < K_STEP; k += Split3xTF32::K)
      mma_3xtf32<false>(
          sums.large,
          [&](int m, int row, int pair) -> Pair {
            return {left(m, row, k + pair * 2), left(m, row, k + pair * 2 + 1)};
          },
          [&](int, int n, int pair, int column) -> Pair {
            return {right(n, column, k + pair * 2), right(n, column, k + pair * 2 + 1)};
          });
  } else {
    for (int k = 0; k < K_STEP; k++) {
      float rows[M_TILES][2], columns[N_TILES][2];
      UNROLL_FOR(int m = 0; m < M_TILES; m++)
        UNROLL_FOR(int half = 0; half < 2; half++) rows[m][half] = left(m, tile_row(half * 2), k);
      UNROLL_FOR(int n = 0; n < N_TILES; n++)
        UNROLL_FOR(int half = 0; half < 2; half++) columns[n][half] = right(n, tile_column(half), k);
      UNROLL_FOR(int m = 0; m < M_TILES; m++)
        UNROLL_FOR(int n = 0; n < N_TILES; n++)
          UNROLL_FOR(int i = 0; i < 4; i++)
            sums.large[m][n].at[i] = fmaf(rows[m][i / 2], columns[n][i % 2], sums.large[m][n].at[i]);
    }
  }
}

}  // namespace graph
