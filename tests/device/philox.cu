// Philox's words for one counter and key, for test_philox.py.
#include "philox.cuh"

// words (n, 4) = the words of counters (n, 4) under keys (n, 2)
ENTRY_POINT(philox, words)(const unsigned* counters, const unsigned* keys, unsigned* words, int n) {
  for (int i : grid_range(n)) {
    const unsigned* counter = counters + i * 4;
    const Words found = philox({{counter[0], counter[1], counter[2], counter[3]}}, keys[i * 2], keys[i * 2 + 1]);
    UNROLL_FOR(int n = 0; n < 4; n++) words[i * 4 + n] = found.at[n];
  }
}
