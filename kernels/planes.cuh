// Products of matrices by tensor cores with float32 accuracy, from numbers that were split once, where they were made.
//
// A number x is two FP16 (11 significant bits each): `whole`, the nearest to x, and `rest`, what rounding left, times
// 2^11. Of the four products the three largest are summed: whole whole, and (whole rest + rest whole) / 2^11, which has
// sums of its own so that nothing is lost where it is added. The relative error of a product is about 2^-22. The method
// is that of H. Ootomo and R. Yokota, "Recovering single precision accuracy from Tensor Cores while surpassing the FP32
// theoretical peak performance", IJHPCA 36 (2022).
//
// The range's ends: below 2^-14 (normal FP16) a number is exact to 2^-36 instead of to 22 bits, so that what is small
// must be scaled up by a power of two where it is not added to larger numbers (errors are: scale_of). From 65520 on a
// number is infinite, and the sums NaN: an overflow stays visible.
//
// Matrices lie in shared memory as `planes`: all wholes, then all rests. A row of eight numbers has 16 bytes and begins
// at a multiple of them. Rows that are loaded together should begin in different banks: a pitch of an odd number of
// eights has that.
#pragma once
#include "tensor.cuh"
#ifndef __CUDACC__
#include "emulated/tensor_cores.hpp"
#endif

constexpr float REST = 2048.0f;  // what a rest is multiplied by

// Two numbers in a word each of wholes and rests, x in the lower half.
__device__ __forceinline__ void split_fp16(float x, float y, unsigned& whole, unsigned& rest) {
#ifdef __CUDACC__
  const auto pack = [](float low, float high) {
    unsigned word;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
#else
    asm("{.reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h};}"
        : "=r"(word)
        : "f"(low), "f"(high));
#endif
    return word;
  };
  float low, high;
  whole = pack(x, y);
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(low), "=f"(high)
      : "r"(whole));
  rest = pack((x - low) * REST, (y - high) * REST);
#else
  const unsigned low = emulated::float_to_half(x), high = emulated::float_to_half(y);
  whole = low | high << 16;
  rest = emulated::float_to_half((x - emulated::half_to_float(static_cast<unsigned short>(low))) * REST) |
         emulated::float_to_half((y - emulated::half_to_float(static_cast<unsigned short>(high))) * REST) << 16;
#endif
}

// One number: x in the lower half, 0 above it.
__device__ __forceinline__ void split_fp16(float x, unsigned& whole, unsigned& rest) {
#ifdef __CUDACC__
  float low;
  const auto pack = [](float low) {
    unsigned word;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(0.0f), "f"(low));
#else
    asm("{.reg .b16 l; cvt.rn.f16.f32 l, %1; mov.b32 %0, {l, 0};}" : "=r"(word) : "f"(low));
#endif
    return word;
  };
  whole = pack(x);
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(low) : "r"(whole));
  rest = pack((x - low) * REST);
#else
  split_fp16(x, 0.0f, whole, rest);
#endif
}

// word << bits, and 0 from 32 bits on.
__device__ __forceinline__ unsigned shift_left(unsigned word, unsigned bits) {
#ifdef __CUDACC__
  unsigned shifted;
  asm("shl.b32 %0, %1, %2;" : "=r"(shifted) : "r"(word), "r"(bits));
  return shifted;
#else
  return bits < 32 ? word << bits : 0u;
#endif
}

// A small whole number, which FP16 holds exactly up to 2048.
__device__ __forceinline__ unsigned short to_fp16(int whole) {
  unsigned word, rest;
  split_fp16(float(whole), 0.0f, word, rest);
  return static_cast<unsigned short>(word);
}

#ifdef __CUDACC__
using SharedAddress = unsigned;
__device__ __forceinline__ SharedAddress address_of(const void* at) {
  return static_cast<unsigned>(__cvta_generic_to_shared(at));
}
#else
using SharedAddress = unsigned long long;
inline SharedAddress address_of(const void* at) { return reinterpret_cast<SharedAddress>(at); }
#endif

// Two or four matrices of 8 x 8 numbers of 16 bits, of which a lane gets two neighbours of a row (TRANSPOSED: of a
// column): lane l names row l % 8 of matrix l / 8. All lanes of a warp.
template <bool TRANSPOSED, int N>
__device__ __forceinline__ void load_matrices(unsigned (&matrix)[N], SharedAddress row) {
  static_assert(N == 2 || N == 4, "ldmatrix.x2 or .x4");
#ifdef __CUDACC__
  if constexpr (N == 4) {
    if (TRANSPOSED)
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
                   : "r"(row)
                   : "memory");
    else
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
                   : "r"(row)
                   : "memory");
  } else {
    if (TRANSPOSED)
      asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                   : "=r"(matrix[0]), "=r"(matrix[1])
                   : "r"(row)
                   : "memory");
    else
      asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                   : "=r"(matrix[0]), "=r"(matrix[1])
                   : "r"(row)
                   : "memory");
  }
#else
  emulated::load_matrices<TRANSPOSED>(matrix, row);
#endif
}

// As the left side of a product (16 x 16) four matrices are upper and lower rows of the first eight terms, then of the
// others; as the right side (16 x 8) two are the first eight terms and the others, where a row is a column of the product.
// Transposed, a row is a term.
__device__ __forceinline__ void load_matrices(unsigned (&matrix)[4], const unsigned short* row) {
  load_matrices<false>(matrix, address_of(row));
}
__device__ __forceinline__ void load_matrices_transposed(unsigned (&matrix)[4], const unsigned short* row) {
  load_matrices<true>(matrix, address_of(row));
}

// sum (16 x 8) += left (16 x 16) right (16 x 8).
__device__ __forceinline__ void mma_fp16(Fragment& sum, const unsigned (&left)[4], const unsigned (&right)[2]) {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(sum.at[0]), "+f"(sum.at[1]), "+f"(sum.at[2]), "+f"(sum.at[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
#else
  UNROLL_FOR(int half = 0; half < 2; half++)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sum.at[0]), "+f"(sum.at[1]), "+f"(sum.at[2]), "+f"(sum.at[3])
        : "r"(left[half * 2]), "r"(left[half * 2 + 1]), "r"(right[half]));
#endif
#else
  emulated::multiply_matrices(sum.at, left, right, emulated::half_to_float);
#endif
}

// A lane's four sums of a 16 x 8 tile: whole + rest / 2^11.
struct PlaneSum {
  Fragment whole, rest;

  __device__ __forceinline__ void clear() {
    UNROLL_FOR(int i = 0; i < 4; i++) whole.at[i] = rest.at[i] = 0.0f;
  }
  __device__ __forceinline__ float at(int i) const { return fmaf(rest.at[i], 1.0f / REST, whole.at[i]); }

  // += left right, each side's wholes and rests.
  __device__ __forceinline__ void add(const unsigned (&left)[4], const unsigned (&left_rest)[4],
                                      const unsigned (&right)[2], const unsigned (&right_rest)[2]) {
    mma_fp16(rest, left_rest, right);
    mma_fp16(rest, left, right_rest);
    mma_fp16(whole, left, right);
  }
};

// As PlaneSum, with sums of their own for the rests of either side, so that fewer products wait for each other.
struct ApartSum {
  Fragment whole, rest, crossed;

  __device__ __forceinline__ void clear() {
    UNROLL_FOR(int i = 0; i < 4; i++) whole.at[i] = rest.at[i] = crossed.at[i] = 0.0f;
  }
  __device__ __forceinline__ float at(int i) const {
    return fmaf(rest.at[i] + crossed.at[i], 1.0f / REST, whole.at[i]);
  }
};
__device__ __forceinline__ Fragment& crossed_of(PlaneSum& sum) { return sum.rest; }
__device__ __forceinline__ Fragment& crossed_of(ApartSum& sum) { return sum.crossed; }

// A power of two that brings the largest of the lanes' numbers to 2^13 or more, below 2^14, where each lane gives the
// bits of the largest size of its own: non-negative floats are in the order of their bits. It is 1 / unscale(scale).
// Where a number is infinite or NaN, it stays so.
__device__ __forceinline__ float scale_of(unsigned largest) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  largest = __reduce_max_sync(0xffffffffu, largest);
#else
  for (int bit = 16; bit; bit /= 2) largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, bit));
#endif
  return __int_as_float(min(253, max(1, 127 + 13 + 127 - static_cast<int>(largest >> 23))) << 23);
}
__device__ __forceinline__ unsigned bits_of_size(float x) {
  return static_cast<unsigned>(__float_as_int(x)) & 0x7fffffffu;
}
// The same for `count` numbers, which begin at a multiple of 16 bytes and which all lanes of a warp look through together.
__device__ __forceinline__ float scale_of(const float* numbers, int count) {
  const int lane = threadIdx.x % 32;
  unsigned largest = 0;
  for (int i = lane * 4; i < count / 4 * 4; i += 128) {
    const uint4 four = *reinterpret_cast<const uint4*>(numbers + i);
    const unsigned size[4] = {four.x, four.y, four.z, four.w};
    UNROLL_FOR(int n = 0; n < 4; n++) largest = max(largest, size[n] & 0x7fffffffu);
  }
  for (int i = count / 4 * 4 + lane; i < count; i += 32) largest = max(largest, bits_of_size(numbers[i]));
  return scale_of(largest);
}
__device__ __forceinline__ float unscale(float scale) { return __int_as_float((254 << 23) - __float_as_int(scale)); }
