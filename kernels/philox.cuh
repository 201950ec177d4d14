// Random numbers that are a function of a counter and a key: Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel
// random numbers: as easy as 1, 2, 3", SC11. cnnlib/layers/philox.py is the same function in numpy.
#pragma once
#include "portable.cuh"

// Four random words, or the four words of a counter.
struct Words {
  unsigned at[4];
};

// The upper 32 bits of a product.
__device__ __forceinline__ unsigned high_word(unsigned a, unsigned b) {
#ifdef __CUDACC__
  return __umulhi(a, b);
#else
  return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
#endif
}

// The words of `counter` under the key (key_low, key_high).
__device__ __forceinline__ Words philox(Words counter, unsigned key_low, unsigned key_high) {
  unsigned a = counter.at[0], b = counter.at[1], c = counter.at[2], d = counter.at[3];
  UNROLL_FOR(int round = 0; round < 10; round++) {
    const unsigned first_high = high_word(0xD2511F53u, a), first_low = 0xD2511F53u * a;
    const unsigned second_high = high_word(0xCD9E8D57u, c), second_low = 0xCD9E8D57u * c;
    a = second_high ^ b ^ key_low;
    b = second_low;
    c = first_high ^ d ^ key_high;
    d = first_low;
    key_low += 0x9E3779B9u;
    key_high += 0xBB67AE85u;
  }
  return {{a, b, c, d}};
}
