// Stage tuned: an activation or a subsampling that follows nothing it could be fused with, of one image by one team.
// Needs: CHANNELS, HEIGHT, WIDTH (source), FUNCTION, WINDOW (1: no subsampling), METHOD, BLOCK (threads of a block), TEAM (of a team).
#include "conv.cuh"

constexpr int OUT_ROWS = HEIGHT / WINDOW, OUT_COLUMNS = WIDTH / WINDOW;
constexpr int TARGET_SIZE = CHANNELS * OUT_ROWS * OUT_COLUMNS;

// first source unit of target unit `at`'s window
__device__ __forceinline__ int corner_of(int at) {
  const int map = at / (OUT_ROWS * OUT_COLUMNS), y = at / OUT_COLUMNS % OUT_ROWS, x = at % OUT_COLUMNS;
  return (map * HEIGHT + y * WINDOW) * WIDTH + x * WINDOW;
}

__device__ __forceinline__ void forward(const float* source, float* target, unsigned char* winners) {
  for (int at = thread_rank(); at < TARGET_SIZE; at += TEAM) {
    float value[WINDOW][WINDOW];
UNROLL
    for (int a = 0; a < WINDOW; a++)
UNROLL
      for (int b = 0; b < WINDOW; b++) value[a][b] = activate<FUNCTION>(source[corner_of(at) + a * WIDTH + b]);
    int winner;
    target[at] = subsample_window<WINDOW, METHOD>(value, &winner);
    if (WINDOW > 1 && METHOD == MAX) winners[at] = (unsigned char)winner;
  }
}

__device__ __forceinline__ void send_back(const float* target, const unsigned char* winners, const float* errors,
                                          float* source_errors) {
  for (int at = thread_rank(); at < TARGET_SIZE; at += TEAM) {
    const int winner = WINDOW > 1 && METHOD == MAX ? winners[at] : 0;
    const float error = errors[at] * (WINDOW > 1 ? 1.0f : slope<FUNCTION>(target[at]));
UNROLL
    for (int a = 0; a < WINDOW; a++)
UNROLL
      for (int b = 0; b < WINDOW; b++)
        source_errors[corner_of(at) + a * WIDTH + b] = METHOD == MEAN             ? error / float(WINDOW * WINDOW)
                                                       : a * WINDOW + b == winner ? error
                                                                                  : 0.0f;
  }
}
