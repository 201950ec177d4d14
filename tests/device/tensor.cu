// Products of matrices by one warp, for test_tensor.py.
#include "tensor.cuh"

// target (16, 8) = left (16, 8) right (8, 8), both row by row
ENTRY_POINT(tensor, multiply)(const float* left, const float* right, float* target) {
  Fragment sum[1][1];
  clear(sum);
  mma_3xtf32<false>(
      sum, [&](int, int row, int pair) -> Pair { return {left[row * 8 + pair], left[row * 8 + pair + 4]}; },
      [&](int, int, int pair, int column) -> Pair {
        return {right[pair * 8 + column], right[(pair + 4) * 8 + column]};
      });
  for (int i = 0; i < 4; i++) target[tile_row(i) * 8 + tile_column(i)] = sum[0][0].at[i];
}

// target (16, 8) = left (16, 16) right (16, 8), the left side whole numbers from 0 to 255
ENTRY_POINT(tensor, multiply_whole)(const int* left, const float* right, float* target) {
  Fragment sum[1][1];
  clear(sum);
  mma_bf16x3(
      sum,
      [&](int, int row, int pair) {
        const int* two = left + row * 16 + pair * 2;
        return unsigned(to_bf16(two[0])) | unsigned(to_bf16(two[1])) << 16;
      },
      [&](int, int pair, int column, unsigned (&words)[3]) {
        split_bf16x3({right[pair * 16 + column], right[pair * 16 + 8 + column]}, words);
      });
  for (int i = 0; i < 4; i++) target[tile_row(i) * 8 + tile_column(i)] = sum[0][0].at[i];
}
