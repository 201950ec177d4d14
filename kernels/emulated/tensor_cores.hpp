// Tensor cores in software, for tests of how their operands lie in registers and in shared memory: what the PTX manual says
// of ldmatrix and of mma.m16n8k16 (sections 9.7.14.5.8 and 9.7.14.5.15), by shuffles. They are slow. A source that defines
// EMULATED_TENSOR_CORES before all else has kernels multiply by them; else an emulated device multiplies floats.
#pragma once
#include "threads.hpp"

namespace emulated {

inline float half_to_float(unsigned short bits) {
  _Float16 half;
  memcpy(&half, &bits, 2);
  return static_cast<float>(half);
}

inline unsigned short float_to_half(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  unsigned short bits;
  memcpy(&bits, &half, 2);
  return bits;
}

inline float bf16_to_float(unsigned short bits) { return __int_as_float(static_cast<int>(bits) << 16); }

// ldmatrix.xN: lane i * 8 + r has the address of row r of matrix i.
template <bool TRANSPOSED, int N>
void load_matrices(unsigned (&words)[N], unsigned long long address) {
  const auto element = [](unsigned long long row, int column) {
    return static_cast<unsigned>(reinterpret_cast<const unsigned short*>(row)[column]);
  };
  const int row = lane() / 4, pair = lane() % 4 * 2;
  for (int i = 0; i < N; i++) {
    const unsigned long long own = __shfl_sync(0xffffffffu, address, i * 8 + row);
    const unsigned long long first = __shfl_sync(0xffffffffu, address, i * 8 + pair);
    const unsigned long long second = __shfl_sync(0xffffffffu, address, i * 8 + pair + 1);
    words[i] = TRANSPOSED ? element(first, row) | element(second, row) << 16
                          : element(own, pair) | element(own, pair + 1) << 16;
  }
}

// mma.m16n8k16 of halves that `number` makes floats of.
template <class Number>
void multiply_matrices(float (&sum)[4], const unsigned (&left)[4], const unsigned (&right)[2], Number number) {
  const int row = lane() / 4, pair = lane() % 4;
  float rows[2][16], columns[2][16];
  for (int other = 0; other < 4; other++)
    for (int i = 0; i < 4; i++) {
      const unsigned word = __shfl_sync(0xffffffffu, left[i], row * 4 + other);
      for (int e = 0; e < 2; e++) rows[i % 2][i / 2 * 8 + other * 2 + e] = number(word >> (16 * e) & 0xffffu);
    }
  for (int column = 0; column < 2; column++)
    for (int other = 0; other < 4; other++)
      for (int i = 0; i < 2; i++) {
        const unsigned word = __shfl_sync(0xffffffffu, right[i], (pair * 2 + column) * 4 + other);
        for (int e = 0; e < 2; e++) columns[column][i * 8 + other * 2 + e] = number(word >> (16 * e) & 0xffffu);
      }
  for (int i = 0; i < 4; i++)
    for (int k = 0; k < 16; k++) sum[i] = fmaf(rows[i / 2][k], columns[i % 2][k], sum[i]);
}

}  // namespace emulated
