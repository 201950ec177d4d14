// Tensor cores in software: what the PTX manual says of ldmatrix and of mma.m16n8k16 (sections 9.7.14.5.8 and
// 9.7.14.5.15), lane by lane. They are slow, but a wrong address or a fragment in a wrong order shows here as it does on a
// GPU. Kernels of planes.cuh always multiply by them. Those of tuned/graph/planes.cuh do in a source that defines
// EMULATED_TENSOR_CORES before all else, and otherwise multiply floats.
#pragma once
#include "threads.hpp"

namespace emulated {

// FP16 as float; exact.
inline float half_to_float(unsigned short bits) {
  const unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31u, fraction = bits & 1023u;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * 0x1p-24f * static_cast<float>(fraction);
  const unsigned wide = exponent == 31 ? 255u : exponent + 112u;
  return __int_as_float(static_cast<int>(sign | wide << 23 | fraction << 13));
}

// The nearest FP16; of two equally near ones the even.
inline unsigned short float_to_half(float x) {
  const unsigned bits = static_cast<unsigned>(__float_as_int(x)), sign = bits >> 16 & 0x8000u;
  const unsigned size = bits & 0x7fffffffu;
  unsigned half;
  if (size > 0x7f800000u)
    half = 0x7fffu;  // NaN
  else if (size >= 0x477ff000u)
    half = 0x7c00u;  // rounds to infinity
  else if (size < 0x38800000u)
    half = static_cast<unsigned>(lrintf(fabsf(x) * 0x1p24f));  // subnormal
  else
    half = ((size + 0xfffu + (size >> 13 & 1u)) >> 13) - 0x1c000u;
  return static_cast<unsigned short>(sign | half);
}

inline float bf16_to_float(unsigned short bits) { return __int_as_float(static_cast<int>(bits) << 16); }

// A number of each lane of the warp, which all lanes must have read before any of them comes to another exchange: that
// would take its place. A __syncwarp sees to it.
struct Lanes {
  const uint64_t* values;
  explicit Lanes(uint64_t own) {
    const int me = emulated_context.thread;
    emulated_exchange(0xffffffffu, lane(), own, EMULATED_SITE);
    values = emulated_context.values + (me & ~31);
  }
  uint64_t operator[](int lane) const { return values[lane]; }
};

// ldmatrix.xN: lane i * 8 + r has the address of row r of matrix i.
template <bool TRANSPOSED, int N>
void load_matrices(unsigned (&words)[N], unsigned long long address) {
  const Lanes rows(address);
  const auto element = [&](int row, int column) {
    return static_cast<unsigned>(reinterpret_cast<const unsigned short*>(rows[row])[column]);
  };
  const int own = lane() / 4, pair = lane() % 4 * 2;
  for (int i = 0; i < N * 8; i += 8)
    words[i / 8] = TRANSPOSED ? element(i + pair, own) | element(i + pair + 1, own) << 16
                              : element(i + own, pair) | element(i + own, pair + 1) << 16;
  __syncwarp();
}

// mma.m16n8k16 of halves that `number` makes floats of: sum (16 x 8) += left (16 x 16) right (16 x 8).
template <class Number>
void multiply_matrices(float (&sum)[4], const unsigned (&left)[4], const unsigned (&right)[2], Number number) {
  struct Own {
    float left[4][2], right[2][2];
  } own;
  for (int half = 0; half < 2; half++) {
    for (int i = 0; i < 4; i++) own.left[i][half] = number(static_cast<unsigned short>(left[i] >> 16 * half));
    for (int i = 0; i < 2; i++) own.right[i][half] = number(static_cast<unsigned short>(right[i] >> 16 * half));
  }
  const Lanes lanes(reinterpret_cast<uint64_t>(&own));
  const auto of = [&](int lane) -> const Own& { return *reinterpret_cast<const Own*>(lanes[lane]); };
  for (int i = 0; i < 4; i++) {
    const int row = lane() / 4, column = lane() % 4 * 2 + i % 2;
    double total = 0.0;
    for (int k = 0; k < 16; k++)
      total += static_cast<double>(of(row * 4 + k % 8 / 2).left[i / 2 + k / 8 * 2][k % 2]) *
               of(column * 4 + k % 8 / 2).right[k / 8][k % 2];
    sum[i] += static_cast<float>(total);
  }
  __syncwarp();
}

}  // namespace emulated
