// The random words of NumPy's PCG64, each one by itself: the generator of M. O'Neill ("PCG: A family of simple fast
// space-efficient statistically good algorithms for random number generation", HMC-CS-2014-0905, 2014; here XSL-RR of
// 128 bits), seeded as numpy.random.SeedSequence does it.
#pragma once
#include "portable.cuh"

// The hashes of SeedSequence.
struct SeedHash {
  unsigned multiplier, factor;

  __device__ __forceinline__ unsigned operator()(unsigned value) {
    value ^= multiplier;
    multiplier *= factor;
    value *= multiplier;
    return value ^ value >> 16;
  }
};

struct Pcg64 {
  typedef unsigned __int128 Wide;
  Wide state, increment;

  // SeedSequence's pool of four words, for an entropy of as many; shorter entropies end in zeros.
  static __device__ __forceinline__ Pcg64 seeded(const unsigned (&entropy)[4]) {
    SeedHash hash = {0x43b0d7e5u, 0x931e8875u};
    unsigned pool[4];
#pragma unroll
    for (int i = 0; i < 4; i++) pool[i] = hash(entropy[i]);
#pragma unroll
    for (int from = 0; from < 4; from++)
#pragma unroll
      for (int to = 0; to < 4; to++) {
        if (from == to) continue;
        const unsigned mixed = 0xca01f9ddu * pool[to] - 0x4973f715u * hash(pool[from]);
        pool[to] = mixed ^ mixed >> 16;
      }
    SeedHash last = {0x8b51f9ddu, 0x58f38dedu};
    unsigned long long words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const unsigned low = last(pool[2 * i % 4]), high = last(pool[(2 * i + 1) % 4]);
      words[i] = static_cast<unsigned long long>(high) << 32 | low;
    }
    const Wide increment = (wide(words[2], words[3]) << 1) | 1;
    return {(increment + wide(words[0], words[1])) * factor() + increment, increment};
  }

  // Word `index` of those that follow; the generator stays where it is.
  __device__ __forceinline__ unsigned long long word(unsigned index) const {
    // F. Brown, "Random number generation with arbitrary strides", Trans. Am. Nucl. Soc. 71, 1994
    Wide there = state, times = factor(), plus = increment;
    for (unsigned steps = index + 1; steps; steps >>= 1) {
      if (steps & 1) there = there * times + plus;
      plus *= times + 1;
      times *= times;
    }
    const unsigned long long mixed =
        static_cast<unsigned long long>(there >> 64) ^ static_cast<unsigned long long>(there);
    const unsigned turn = static_cast<unsigned>(there >> 122);
    return mixed >> turn | mixed << (-turn & 63);
  }

 private:
  static __device__ __forceinline__ Wide wide(unsigned long long high, unsigned long long low) {
    return static_cast<Wide>(high) << 64 | low;
  }
  static __device__ __forceinline__ Wide factor() { return wide(2549297995355413924ull, 4865540595714422341ull); }
};
