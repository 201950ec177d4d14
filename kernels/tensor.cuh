// Products of small matrices by one warp, 16 rows by 8 columns, to float32's accuracy. On a GPU tensor cores multiply:
//   two matrices of floats as TF32 (11 significant bits): every float is cut into two of them, and of the four products
//   the three largest are summed, which leaves a relative error of about 2^-21 a product;
//   bytes by floats as BF16 (8 significant bits): a byte is one of them, a float exactly three.
// Elsewhere plain arithmetic does.
#pragma once
#include "portable.cuh"

// Pair neighbouring floats that are loaded as one.
struct alignas(8) Pair {
  float x, y;
};

// A lane's four numbers of a 16 x 8 matrix.
struct Fragment {
  float at[4];
};

__device__ __forceinline__ int tile_row(int i) { return threadIdx.x % 32 / 4 + i / 2 * 8; }
__device__ __forceinline__ int tile_column(int i) { return threadIdx.x % 4 * 2 + i % 2; }

template <int DOWN, int ACROSS>
__device__ __forceinline__ void clear(Fragment (&sum)[DOWN][ACROSS]) {
UNROLL
  for (int m = 0; m < DOWN; m++)
UNROLL
    for (int n = 0; n < ACROSS; n++)
UNROLL
      for (int i = 0; i < 4; i++) sum[m][n].at[i] = 0.0f;
}

// A small whole number, exact in BF16, as the BF16 in the upper or lower half of a word.
__device__ __forceinline__ unsigned short to_bf16(int whole) {
  return static_cast<unsigned short>(static_cast<unsigned>(__float_as_int(float(whole))) >> 16);
}
constexpr unsigned TWO_ONES = 0x3f803f80u;  // 1 in both halves

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800

// x = large + small, both of which tensor cores take as TF32 (they do not look at a float's last 13 bits). Rounding to
// nearest halves the error; where x is not finite, small is NaN.
__device__ __forceinline__ void split_tf32(float x, unsigned& large, unsigned& small) {
  large = (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
  small = __float_as_uint(x - __uint_as_float(large));
}

__device__ __forceinline__ void mma_tf32(Fragment& sum, const unsigned (&left)[4], const unsigned (&right)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum.at[0]), "+f"(sum.at[1]), "+f"(sum.at[2]), "+f"(sum.at[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

__device__ __forceinline__ void mma_bf16(Fragment& sum, const unsigned (&left)[4], const unsigned (&right)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum.at[0]), "+f"(sum.at[1]), "+f"(sum.at[2]), "+f"(sum.at[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

#endif

// The three BF16 that two floats are the sum of: words[part] has the first's in its lower half, the second's above.
__device__ __forceinline__ void split_bf16x3(Pair two, unsigned (&words)[3]) {
UNROLL
  for (int part = 0; part < 3; part++) {
    const unsigned x = static_cast<unsigned>(__float_as_int(two.x)) & 0xffff0000u;
    const unsigned y = static_cast<unsigned>(__float_as_int(two.y)) & 0xffff0000u;
    words[part] = x >> 16 | y;
    two.x -= __int_as_float(static_cast<int>(x));
    two.y -= __int_as_float(static_cast<int>(y));
  }
}

// sum[m][n] += left m (16 x 8) right (m, n) (8 x 8). The inner dimension comes in four pairs: left(m, row, pair) is the
// row's Pair of them, right(m, n, pair, column) the column's; which eight these are is the caller's choice.
// EACH: every m has a right side of its own. All lanes of the warp must call it together; both functions must be finite
// wherever the other side is 0 for want of something to multiply.
template <bool EACH, int DOWN, int ACROSS, class Left, class Right>
__device__ __forceinline__ void mma_3xtf32(Fragment (&sum)[DOWN][ACROSS], Left left, Right right) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  constexpr int SIDES = EACH ? DOWN : 1;
  const int row = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
  Pair upper[DOWN], lower[DOWN], column[SIDES][ACROSS];
  // all loads before the first product, and products that wait for each other as far apart as can be
UNROLL
  for (int m = 0; m < DOWN; m++) upper[m] = left(m, row, pair), lower[m] = left(m, row + 8, pair);
UNROLL
  for (int m = 0; m < SIDES; m++)
UNROLL
    for (int n = 0; n < ACROSS; n++) column[m][n] = right(m, n, pair, row);
  unsigned whole[DOWN][4], rest[DOWN][4], large[SIDES][ACROSS][2], small[SIDES][ACROSS][2];
UNROLL
  for (int m = 0; m < SIDES; m++)
UNROLL
    for (int n = 0; n < ACROSS; n++) {
      split_tf32(column[m][n].x, large[m][n][0], small[m][n][0]);
      split_tf32(column[m][n].y, large[m][n][1], small[m][n][1]);
    }
UNROLL
  for (int m = 0; m < DOWN; m++) {
    split_tf32(upper[m].x, whole[m][0], rest[m][0]);
    split_tf32(lower[m].x, whole[m][1], rest[m][1]);
    split_tf32(upper[m].y, whole[m][2], rest[m][2]);
    split_tf32(lower[m].y, whole[m][3], rest[m][3]);
  }
UNROLL
  for (int product = 0; product < 3; product++)
UNROLL
    for (int m = 0; m < DOWN; m++)
UNROLL
      for (int n = 0; n < ACROSS; n++)
        mma_tf32(sum[m][n], product == 0 ? rest[m] : whole[m],
                      product == 1 ? small[EACH ? m : 0][n] : large[EACH ? m : 0][n]);
#else
  for (int m = 0; m < DOWN; m++)
    for (int n = 0; n < ACROSS; n++)
      for (int i = 0; i < 4; i++)
        for (int pair = 0; pair < 4; pair++) {
          const Pair a = left(m, tile_row(i), pair), b = right(m, n, pair, tile_column(i));
          sum[m][n].at[i] = fmaf(a.x, b.x, fmaf(a.y, b.y, sum[m][n].at[i]));
        }
#endif
}

// sum[m][n] += left m (16 x 16) right n (16 x 8), where the left side is small whole numbers. The inner dimension comes
// in eight pairs: left(m, row, pair) is a word of two BF16, right(n, pair, column, words) gives a float pair's three.
template <int DOWN, int ACROSS, class Left, class Right>
__device__ __forceinline__ void mma_bf16x3(Fragment (&sum)[DOWN][ACROSS], Left left, Right right) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const int row = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
  unsigned whole[DOWN][4], words[ACROSS][2][3];
UNROLL
  for (int m = 0; m < DOWN; m++)
UNROLL
    for (int i = 0; i < 4; i++) whole[m][i] = left(m, row + i % 2 * 8, pair + i / 2 * 4);
UNROLL
  for (int n = 0; n < ACROSS; n++)
UNROLL
    for (int half = 0; half < 2; half++) right(n, pair + half * 4, row, words[n][half]);
UNROLL
  for (int part = 2; part >= 0; part--)
UNROLL
    for (int m = 0; m < DOWN; m++)
UNROLL
      for (int n = 0; n < ACROSS; n++) {
        const unsigned both[2] = {words[n][0][part], words[n][1][part]};
        mma_bf16(sum[m][n], whole[m], both);
      }
#else
  const auto value = [](unsigned half) { return __int_as_float(static_cast<int>(half << 16)); };
  for (int m = 0; m < DOWN; m++)
    for (int n = 0; n < ACROSS; n++)
      for (int i = 0; i < 4; i++)
        for (int pair = 0; pair < 8; pair++) {
          const unsigned a = left(m, tile_row(i), pair);
          unsigned words[3];
          right(n, pair, tile_column(i), words);
          for (unsigned word : words)
            sum[m][n].at[i] = fmaf(value(a & 0xffffu), value(word & 0xffffu),
                                   fmaf(value(a >> 16), value(word >> 16), sum[m][n].at[i]));
        }
#endif
}
