// The order of an epoch, drawn where it is needed: a Feistel network (M. Luby and C. Rackoff, "How to construct
// pseudorandom permutations from pseudorandom functions", SIAM J. Comput. 17, 1988), walked until it stays below
// `count`. cnnlib/engine/shuffle.py says how its tables are made, and does the same on the host.
#pragma once
#include "portable.cuh"

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
