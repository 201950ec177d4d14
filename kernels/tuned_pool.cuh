// Stage tuned: what follows a convolution's sums, and how errors come back to them; part of tuned_conv.cuh and
// tuned_first.cuh, whose constants it needs.

constexpr bool PAIRED = WINDOW % 2 == 0 && COLUMNS % 2 == 0 && FULL_PITCH % 2 == 0;  // a window's rows are whole Twos

// The larger, or NaN if one is.
__device__ __forceinline__ float larger(float a, float b) {
#ifdef __CUDA_ARCH__
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a > b || a != a ? a : b;
#endif
}

// value += the sums of a window. from: its first
__device__ __forceinline__ void add_window(float (&value)[WINDOW][WINDOW], const float* from) {
UNROLL
  for (int a = 0; a < WINDOW; a++) {
    if (PAIRED) {
UNROLL
      for (int b = 0; b < WINDOW; b += 2) {
        const Two two = *reinterpret_cast<const Two*>(from + a * COLUMNS + b);
        value[a][b] += two.x;
        value[a][(b + 1) % WINDOW] += two.y;
      }
    } else {
UNROLL
      for (int b = 0; b < WINDOW; b++) value[a][b] += from[a * COLUMNS + b];
    }
  }
}

// What the sums become: target (TARGET_SIZE,) and what backward will ask for. scratch (SHARES, MAPS, FULL_PITCH): the
// sums of each share of the terms. bias (MAPS,); the sums are multiplied by `scale`, which is positive, before.
__device__ __forceinline__ void finish(const float* bias, float* target, unsigned char* winners, float* full,
                                       const float* scratch, float scale = 1.0f) {
  for (int at = member(); at < TARGET_SIZE; at += TEAM) {
    const int map = at / OUT_AREA, window = at % OUT_AREA;
    const int corner = window / OUT_COLUMNS * WINDOW * COLUMNS + window % OUT_COLUMNS * WINDOW;
    float value[WINDOW][WINDOW];
UNROLL
    for (int i = 0; i < WINDOW * WINDOW; i++) value[i / WINDOW][i % WINDOW] = 0.0f;
UNROLL
    for (int share = 0; share < SHARES; share++)
      add_window(value, scratch + (share * MAPS + map) * FULL_PITCH + corner);
    if (METHOD == MAX) {
      // the functions do not fall, so that the largest sum is the largest value
      float largest = value[0][0];
UNROLL
      for (int i = 1; i < WINDOW * WINDOW; i++) largest = larger(largest, value[i / WINDOW][i % WINDOW]);
      target[at] = activate<FUNCTION>(fmaf(largest, scale, bias[map]));
      if (WINDOW == 1) continue;
      int winner = WINDOW * WINDOW - 1;
UNROLL
      for (int i = WINDOW * WINDOW - 2; i >= 0; i--)
        if (value[i / WINDOW][i % WINDOW] == largest) winner = i;
      winners[at] = (unsigned char)winner;
      continue;
    }
UNROLL
    for (int i = 0; i < WINDOW * WINDOW; i++) {
      float& own = value[i / WINDOW][i % WINDOW];
      own = activate<FUNCTION>(fmaf(own, scale, bias[map]));
      if (KEEPS) full[map * FULL_PITCH + corner + i / WINDOW * COLUMNS + i % WINDOW] = own;
    }
    int winner;
    target[at] = subsample_window<WINDOW, METHOD>(value, &winner);
  }
}

// full (MAPS, AREA) = derivative of the loss by the convolution's sums; errors (TARGET_SIZE,) are the target's.
__device__ __forceinline__ void spread(const float* target, const unsigned char* winners, const float* errors,
                                       float* full) {
  for (int at = member(); at < TARGET_SIZE; at += TEAM) {
    const int map = at / OUT_AREA, window = at % OUT_AREA;
    const int y = window / OUT_COLUMNS * WINDOW, x = window % OUT_COLUMNS * WINDOW;
    const float error = errors[at];
    // for max the target is the winner's own activated value; the losers' derivatives are not needed
    const float winning = WINDOW > 1 && METHOD == MEAN ? 0.0f : error * slope<FUNCTION>(target[at]);
    const int winner = WINDOW > 1 && METHOD == MAX ? winners[at] : 0;
UNROLL
    for (int a = 0; a < WINDOW; a++) {
      float* row = full + map * FULL_PITCH + (y + a) * COLUMNS + x;
      const auto value = [&](int b) {
        if (WINDOW > 1 && METHOD == MEAN)
          return error / float(WINDOW * WINDOW) * (KEEPS ? slope<FUNCTION>(row[b]) : 1.0f);
        return a * WINDOW + b == winner ? winning : 0.0f;
      };
      if (PAIRED) {
UNROLL
        for (int b = 0; b < WINDOW; b += 2) *reinterpret_cast<Two*>(row + b) = {value(b), value(b + 1)};
      } else {
UNROLL
        for (int b = 0; b < WINDOW; b++) row[b] = value(b);
      }
    }
  }
  constexpr int REST = AREA_EIGHTS * 8 - AREA;
  for (int i = member(); i < MAPS * REST; i += TEAM) full[i / max(1, REST) * FULL_PITCH + AREA + i % max(1, REST)] = 0.0f;
}
