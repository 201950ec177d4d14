// Numbers in planes and their products by one warp, for test_planes.py.
#include "planes.cuh"

// planes (2, n) of FP16 = numbers (n,), n even
ENTRY_POINT(planes, split)(const float* numbers, unsigned short* planes, int n) {
  for (int i = static_cast<int>(threadIdx.x) * 2; i < n; i += 64) {
    unsigned whole, rest;
    split_fp16(numbers[i], numbers[i + 1], whole, rest);
    planes[i] = static_cast<unsigned short>(whole), planes[i + 1] = static_cast<unsigned short>(whole >> 16);
    planes[n + i] = static_cast<unsigned short>(rest), planes[n + i + 1] = static_cast<unsigned short>(rest >> 16);
  }
}

// A plane's rows, 24 numbers apart.
__device__ __forceinline__ void lay(const float* matrix, int rows, int columns, unsigned short* planes) {
  for (int i = static_cast<int>(threadIdx.x); i < rows * columns / 2; i += 32) {
    const int row = i / (columns / 2), column = i % (columns / 2) * 2;
    unsigned* at = reinterpret_cast<unsigned*>(planes + row * 24 + column);
    split_fp16(matrix[row * columns + column], matrix[row * columns + column + 1], at[0], at[rows * 12]);
  }
}

// target (16, 8) = left (16, 16) right (16, 8). The sides lie in shared memory as they are given, row by row, or each
// transposed. That of the right side, (8, 16), is what ldmatrix takes without transposing.
ENTRY_POINT(planes, multiply)(const float* left, const float* right, float* target, int left_turned, int right_turned) {
  SHARED(uint4, space, 96 + 96);
  unsigned short* const sides[2] = {reinterpret_cast<unsigned short*>(space),
                                    reinterpret_cast<unsigned short*>(space + 96)};
  lay(left, 16, 16, sides[0]);
  if (right_turned)
    lay(right, 8, 16, sides[1]);
  else
    lay(right, 16, 8, sides[1]);
  __syncthreads();
  const int lane = threadIdx.x % 32, row = lane % 8, first = lane / 8 % 2 * 8, second = lane / 16 * 8;
  unsigned whole[4], rest[4], both[4];
  if (left_turned) {
    const unsigned short* at = sides[0] + (second + row) * 24 + first;
    load_matrices_transposed(whole, at);
    load_matrices_transposed(rest, at + 16 * 24);
  } else {
    const unsigned short* at = sides[0] + (first + row) * 24 + second;
    load_matrices(whole, at);
    load_matrices(rest, at + 16 * 24);
  }
  if (right_turned)
    load_matrices(both, sides[1] + row * 24 + first + lane / 16 * 8 * 24);
  else
    load_matrices_transposed(both, sides[1] + (first + row) * 24 + lane / 16 * 16 * 24);
  const unsigned terms[2] = {both[0], both[1]}, rests[2] = {both[2], both[3]};
  PlaneSum sum;
  sum.clear();
  sum.add(whole, rest, terms, rests);
  for (int i = 0; i < 4; i++) target[tile_row(i) * 8 + tile_column(i)] = sum.at(i);
}

// found = (scale of `count` numbers, 1 / scale), and the lanes that found another
ENTRY_POINT(planes, scale)(const float* numbers, int count, float* found) {
  const float scale = scale_of(numbers, count), first = __shfl_sync(0xffffffffu, scale, 0);
  const unsigned others = __ballot_sync(0xffffffffu, scale != first);
  if (threadIdx.x == 0) found[0] = scale, found[1] = unscale(scale), found[2] = float(__popc(others));
}
