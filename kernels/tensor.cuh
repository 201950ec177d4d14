// Products of small matrices by one warp, 16 rows by 8 columns, with float32 accuracy. On a GPU of compute capability 8.0
// or more tensor cores multiply:
//   3xTF32: two matrices of floats as TF32 (11 significant bits). Every float is split into two of them, and of the
//   four products the three largest are summed, which leaves a relative error of about 2^-21 a product. The method is
//   that of CUTLASS's example 27 (27_ampere_3xtf32_fast_accurate_tensorop_gemm; 28 for convolutions) and of H. Ootomo
//   and R. Yokota, "Recovering single precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak
//   performance", IJHPCA 36 (2022), without their correction of how tensor cores round sums; bytes by floats as BF16 (8
//   significant bits): a byte is one of them, a float exactly the sum of three.
// Older GPUs and an emulated device use plain multiply-adds, by the same text. A layer takes one of the policies below as
// a template argument.
#pragma once
#include "portable.cuh"

// Pair neighbouring floats that are loaded as one.
struct alignas(8) Pair {
  float x, y;
};

// Both by one load, past the first-level cache as load_l2(const float*) does.
__device__ __forceinline__ Pair load_l2(const Pair* at) {
#ifdef __CUDACC__
  const float2 two = __ldcg(reinterpret_cast<const float2*>(at));
  return {two.x, two.y};
#else
  return *at;
#endif
}

// A lane's four numbers of a 16 x 8 matrix.
struct Fragment {
  float at[4];
};

__device__ __forceinline__ int tile_row(int i) { return threadIdx.x % 32 / 4 + i / 2 * 8; }
__device__ __forceinline__ int tile_column(int i) { return threadIdx.x % 4 * 2 + i % 2; }

template <int M_TILES, int N_TILES>
__device__ __forceinline__ void clear(Fragment (&sum)[M_TILES][N_TILES]) {
  UNROLL_FOR(int m = 0; m < M_TILES; m++)
    UNROLL_FOR(int n = 0; n < N_TILES; n++)
      UNROLL_FOR(int i = 0; i < 4; i++) sum[m][n].at[i] = 0.0f;
}

// A small whole number, exact in BF16, as the BF16 in the upper or lower half of a word.
__device__ __forceinline__ unsigned short to_bf16(int whole) {
  return static_cast<unsigned short>(static_cast<unsigned>(__float_as_int(float(whole))) >> 16);
}
constexpr unsigned TWO_ONES = 0x3f803f80u;  // 1 in both halves

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800

// x = large + small, and tensor cores take both as TF32 (they ignore a float's last 13 bits). Rounding to
// nearest halves the error; where x is not finite, small is NaN.
__device__ __forceinline__ void split_tf32(float x, unsigned& large, unsigned& small) {
  large = (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
  small = __float_as_uint(x - __uint_as_float(large));
}

__device__ __forceinline__ void mma_tf32(Fragment& sum, const unsigned (&left)[4], const unsigned (&right)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(sum.at[0]), "+f"(sum.at[1]), "+f"(sum.at[2]), "+f"(sum.at[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

__device__ __forceinline__ void mma_bf16(Fragment& sum, const unsigned (&left)[4], const unsigned (&right)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(sum.at[0]), "+f"(sum.at[1]), "+f"(sum.at[2]), "+f"(sum.at[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

#endif

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 800

// sum[m][n] += the products of a lane's two rows of left m and two columns of right n, in one pair of terms: by plain
// multiply-adds in float32, where there are no tensor cores that take TF32 and BF16.
template <bool PER_ROW_B, int M_TILES, int N_TILES, int SIDES>
__device__ __forceinline__ void add_products(Fragment (&sum)[M_TILES][N_TILES], const Pair (&left)[M_TILES][2],
                                             const Pair (&right)[SIDES][N_TILES][2]) {
  UNROLL_FOR(int m = 0; m < M_TILES; m++)
    UNROLL_FOR(int n = 0; n < N_TILES; n++)
      UNROLL_FOR(int i = 0; i < 4; i++) {
        const Pair a = left[m][i / 2], b = right[PER_ROW_B ? m : 0][n][i % 2];
        sum[m][n].at[i] = fmaf(a.x, b.x, fmaf(a.y, b.y, sum[m][n].at[i]));
      }
}

#endif

// The three BF16 that two floats are the sum of: words[part] has the first's in its lower half, the second's above.
__device__ __forceinline__ void split_bf16x3(Pair two, unsigned (&words)[3]) {
  UNROLL_FOR(int part = 0; part < 3; part++) {
    const unsigned x = static_cast<unsigned>(__float_as_int(two.x)) & 0xffff0000u;
    const unsigned y = static_cast<unsigned>(__float_as_int(two.y)) & 0xffff0000u;
    words[part] = x >> 16 | y;
    two.x -= __int_as_float(static_cast<int>(x));
    two.y -= __int_as_float(static_cast<int>(y));
  }
}

// sum[m][n] += left m (16 x 8) right (m, n) (8 x 8). The inner dimension comes in four pairs: left(m, row, pair) is the
// row's Pair of them, right(m, n, pair, column) the column's; which eight these are is the caller's choice.
// PER_ROW_B: every m has a right side of its own. All lanes of the warp must call it together; both functions must be
// finite wherever the other side is 0 for want of something to multiply.
template <bool PER_ROW_B, int M_TILES, int N_TILES, class Left, class Right>
__device__ __forceinline__ void mma_3xtf32(Fragment (&sum)[M_TILES][N_TILES], Left left, Right right) {
  constexpr int SIDES = PER_ROW_B ? M_TILES : 1;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const int row = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
  Pair upper[M_TILES], lower[M_TILES], column[SIDES][N_TILES];
  // all loads before the first product, and products that wait for each other as far apart as can be
  UNROLL_FOR(int m = 0; m < M_TILES; m++) upper[m] = left(m, row, pair), lower[m] = left(m, row + 8, pair);
  UNROLL_FOR(int m = 0; m < SIDES; m++)
    UNROLL_FOR(int n = 0; n < N_TILES; n++) column[m][n] = right(m, n, pair, row);
  unsigned whole[M_TILES][4], rest[M_TILES][4], large[SIDES][N_TILES][2], small[SIDES][N_TILES][2];
  UNROLL_FOR(int m = 0; m < SIDES; m++)
    UNROLL_FOR(int n = 0; n < N_TILES; n++) {
      split_tf32(column[m][n].x, large[m][n][0], small[m][n][0]);
      split_tf32(column[m][n].y, large[m][n][1], small[m][n][1]);
    }
  UNROLL_FOR(int m = 0; m < M_TILES; m++) {
    split_tf32(upper[m].x, whole[m][0], rest[m][0]);
    split_tf32(lower[m].x, whole[m][1], rest[m][1]);
    split_tf32(upper[m].y, whole[m][2], rest[m][2]);
    split_tf32(lower[m].y, whole[m][3], rest[m][3]);
  }
  UNROLL_FOR(int product = 0; product < 3; product++)
    UNROLL_FOR(int m = 0; m < M_TILES; m++)
      UNROLL_FOR(int n = 0; n < N_TILES; n++)
        mma_tf32(sum[m][n], product == 0 ? rest[m] : whole[m],
                 product == 1 ? small[PER_ROW_B ? m : 0][n] : large[PER_ROW_B ? m : 0][n]);
#else
  for (int pair = 0; pair < 4; pair++) {
    Pair a[M_TILES][2], b[SIDES][N_TILES][2];
    UNROLL_FOR(int m = 0; m < M_TILES; m++)
      UNROLL_FOR(int half = 0; half < 2; half++) a[m][half] = left(m, tile_row(half * 2), pair);
    UNROLL_FOR(int m = 0; m < SIDES; m++)
      UNROLL_FOR(int n = 0; n < N_TILES; n++)
        UNROLL_FOR(int half = 0; half < 2; half++) b[m][n][half] = right(m, n, pair, tile_column(half));
    add_products<PER_ROW_B>(sum, a, b);
  }
#endif
}

// sum[m][n] += left m (16 x 16) right n (16 x 8), where the left side is small whole numbers. The inner dimension comes
// in eight pairs: left(m, row, pair) is a word of two BF16, right(n, pair, column, words) gives a float pair's three.
template <int M_TILES, int N_TILES, class Left, class Right>
__device__ __forceinline__ void mma_bf16x3(Fragment (&sum)[M_TILES][N_TILES], Left left, Right right) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const int row = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
  unsigned whole[M_TILES][4], words[N_TILES][2][3];
  UNROLL_FOR(int m = 0; m < M_TILES; m++)
    UNROLL_FOR(int i = 0; i < 4; i++) whole[m][i] = left(m, row + i % 2 * 8, pair + i / 2 * 4);
  UNROLL_FOR(int n = 0; n < N_TILES; n++)
    UNROLL_FOR(int half = 0; half < 2; half++) right(n, pair + half * 4, row, words[n][half]);
  UNROLL_FOR(int part = 2; part >= 0; part--)
    UNROLL_FOR(int m = 0; m < M_TILES; m++)
      UNROLL_FOR(int n = 0; n < N_TILES; n++) {
        const unsigned both[2] = {words[n][0][part], words[n][1][part]};
        mma_bf16(sum[m][n], whole[m], both);
      }
#else
  const auto value = [](unsigned half) { return __int_as_float(static_cast<int>(half << 16)); };
  for (int pair = 0; pair < 8; pair++) {
    Pair a[M_TILES][2], b[1][N_TILES][2];
    UNROLL_FOR(int m = 0; m < M_TILES; m++)
      UNROLL_FOR(int half = 0; half < 2; half++) {
        const unsigned word = left(m, tile_row(half * 2), pair);
        a[m][half] = {value(word & 0xffffu), value(word >> 16)};
      }
    UNROLL_FOR(int n = 0; n < N_TILES; n++)
      UNROLL_FOR(int half = 0; half < 2; half++) {
        unsigned words[3];
        right(n, pair, tile_column(half), words);
        b[0][n][half] = {0.0f, 0.0f};
        // the smallest first: each sum is exact
        UNROLL_FOR(int part = 2; part >= 0; part--) {
          b[0][n][half].x += value(words[part] & 0xffffu);
          b[0][n][half].y += value(words[part] >> 16);
        }
      }
    add_products<false>(sum, a, b);
  }
#endif
}

// How operands are split so that tensor cores multiply them with float32 accuracy. A policy has multiply(), of which
// the sides are functions as above. PER_ROW_B as in mma_3xtf32.
struct Split3xTF32 {
  static constexpr int K = 8;  // terms of a tile
  template <bool PER_ROW_B, int M_TILES, int N_TILES, class Left, class Right>
  static __device__ __forceinline__ void multiply(Fragment (&sum)[M_TILES][N_TILES], Left left, Right right) {
    mma_3xtf32<PER_ROW_B>(sum, left, right);
  }
};

// The left side is bytes, each a BF16; the right side floats, each split into three.
struct SplitBF16x3 {
  static constexpr int K = 16;
  template <int M_TILES, int N_TILES, class Left, class Right>
  static __device__ __forceinline__ void multiply(Fragment (&sum)[M_TILES][N_TILES], Left left, Right right) {
    mma_bf16x3(sum, left, right);
  }
  static __device__ __forceinline__ void split(Pair pair, unsigned (&words)[3]) { split_bf16x3(pair, words); }
};
