// The order of an epoch, drawn where it is needed: a Feistel network (M. Luby and C. Rackoff, "How to construct
// pseudorandom permutations from pseudorandom functions", SIAM J. Comput. 17, 1988), walked until it stays below
// `count`. cnnlib/engine/shuffle.py says how its tables are made, and does the same on the host.
#pragma once
#include "pcg64.cuh"
#include "portable.cuh"

// tables (ROUNDS, 2^half): the rounds' functions for an epoch, by its entropy (Shuffle.entropy of shuffle.py).
template <int ROUNDS>
__device__ __forceinline__ void draw_tables(unsigned short* __restrict__ tables, int half,
                                            const unsigned (&entropy)[4]) {
  const Pcg64 random = Pcg64::seeded(entropy);
  const int size = ROUNDS << half;
  for (int i : grid_range((size + 3) / 4)) {
    const unsigned long long word = random.word(i);
    for (int part = 0; part < 4 && 4 * i + part < size; part++)
      tables[4 * i + part] = static_cast<unsigned short>(static_cast<unsigned short>(word >> 16 * part) >> (16 - half));
  }
}

// order (count,) becomes a permutation of [0, count). tables (ROUNDS, 2^half), each below 2^half; count <= 4^half.
template <int ROUNDS>
__device__ __forceinline__ void shuffle_images(const unsigned short* __restrict__ tables, int* __restrict__ order,
                                               int half, int count) {
  const unsigned mask = (1u << half) - 1;
  for (int i : grid_range(count)) {
    unsigned number = static_cast<unsigned>(i);
    do {
      unsigned left = number >> half, right = number & mask;
      for (int round = 0; round < ROUNDS; round++) {
        const unsigned mixed = left ^ tables[(round << half) + right];
        left = right, right = mixed;
      }
      number = left << half | right;
    } while (number >= static_cast<unsigned>(count));
    order[i] = static_cast<int>(number);
  }
}
