// Stage tuned: convolution + bias + activation + subsampling of one image by one block, all in shared memory.
// Needs: CHANNELS, HEIGHT, WIDTH (source), MAPS, KERNEL, STRIDE, ROWS, COLUMNS (of the convolution), FUNCTION
// (IDENTITY without activation), WINDOW (1 without subsampling), METHOD, EACH (neighbouring maps a thread makes;
// divides MAPS), SHARES (threads that share the channels of one such sum; divides CHANNELS), OWNED and SPLITS (rows of
// the weight gradient a thread owns, threads that share one), SENDERS (threads that share the maps of one row of
// source errors), KEEPS (the activated values stay in `full` from forward to backward), BLOCK (threads).
// Every function is called by all threads of the block, between barriers that the caller places.
#include "conv.cuh"

constexpr int AREA = ROWS * COLUMNS, TERMS = CHANNELS * KERNEL * KERNEL;
constexpr int SOURCE_SIZE = CHANNELS * HEIGHT * WIDTH;
constexpr int OUT_ROWS = ROWS / WINDOW, OUT_COLUMNS = COLUMNS / WINDOW;
constexpr int OUT_AREA = OUT_ROWS * OUT_COLUMNS, TARGET_SIZE = MAPS * OUT_AREA;
constexpr int ITEMS = MAPS / EACH * OUT_AREA;  // windows x groups of maps
constexpr int WINDOW_SUMS = WINDOW * WINDOW * EACH;
constexpr int GRADIENT_ROWS = MAPS * CHANNELS * KERNEL;
constexpr int PARAMETERS = MAPS * TERMS + MAPS;
constexpr bool SHORT_ROWS = COLUMNS <= 32 && WIDTH <= 32;  // a row fits a thread's registers

// A thread's share of the gradient, kept in registers over all images of a step.
struct Sums {
  float row[OWNED][KERNEL + 1];  // KERNEL neighbouring weights, and their map's bias
};

// held = weight (MAPS, TERMS) transposed to (TERMS, MAPS), then bias (MAPS,)
__device__ __forceinline__ void hold(const float* parameters, float* held) {
  for (int i : block_range(MAPS * TERMS)) held[i % TERMS * MAPS + i / TERMS] = fresh(parameters + i);
  for (int i : block_range(MAPS)) held[MAPS * TERMS + i] = fresh(parameters + MAPS * TERMS + i);
}

// The last thing that happens to an item's sums: activation, subsampling, and what backward will ask for.
__device__ __forceinline__ void finish(const float (&sum)[WINDOW][WINDOW][EACH], int item, float* target,
                                       unsigned char* winners, float* full) {
  const int window = item % OUT_AREA;
  const int y = window / OUT_COLUMNS * WINDOW, x = window % OUT_COLUMNS * WINDOW;
UNROLL
  for (int m = 0; m < EACH; m++) {
    const int map = item / OUT_AREA * EACH + m, at = map * OUT_AREA + window;
    float value[WINDOW][WINDOW];
UNROLL
    for (int a = 0; a < WINDOW; a++)
UNROLL
      for (int b = 0; b < WINDOW; b++) {
        value[a][b] = activate<FUNCTION>(sum[a][b][m]);
        if (KEEPS) full[map * AREA + (y + a) * COLUMNS + x + b] = value[a][b];
      }
    int winner;
    target[at] = subsample_window<WINDOW, METHOD>(value, &winner);
    if (WINDOW > 1 && METHOD == MAX) winners[at] = (unsigned char)winner;
  }
}

// source (SOURCE_SIZE,) -> target (TARGET_SIZE,). scratch: SHARES * ITEMS * WINDOW_SUMS floats if SHARES > 1.
__device__ __forceinline__ void forward(const float* source, const float* held, float* target,
                                        unsigned char* winners, float* full, float* scratch) {
  constexpr int OWN = CHANNELS / SHARES;
  for (int job = threadIdx.x; job < ITEMS * SHARES; job += BLOCK) {
    const int item = job % ITEMS, share = job / ITEMS;
    const int map = item / OUT_AREA * EACH, y = item % OUT_AREA / OUT_COLUMNS, x = item % OUT_COLUMNS;
    const float* corner = source + (share * OWN * HEIGHT + y * WINDOW * STRIDE) * WIDTH + x * WINDOW * STRIDE;
    float sum[WINDOW][WINDOW][EACH];
UNROLL
    for (int m = 0; m < EACH; m++)
UNROLL
      for (int a = 0; a < WINDOW; a++)
UNROLL
        for (int b = 0; b < WINDOW; b++) sum[a][b][m] = share == 0 ? held[MAPS * TERMS + map + m] : 0.0f;
    convolve_window<OWN, KERNEL, STRIDE, WINDOW, MAPS, EACH>(
        sum, [&](int c, int a) { return corner + (c * HEIGHT + a) * WIDTH; },
        held + share * OWN * KERNEL * KERNEL * MAPS + map);
    if (SHARES > 1) {
UNROLL
      for (int i = 0; i < WINDOW_SUMS; i++)
        scratch[(share * WINDOW_SUMS + i) * ITEMS + item] = sum[i / EACH / WINDOW][i / EACH % WINDOW][i % EACH];
    } else {
      finish(sum, item, target, winners, full);
    }
  }
  if (SHARES == 1) return;
  __syncthreads();
  for (int item = threadIdx.x; item < ITEMS; item += BLOCK) {
    float sum[WINDOW][WINDOW][EACH];
UNROLL
    for (int i = 0; i < WINDOW_SUMS; i++) {
      float total = scratch[i * ITEMS + item];
UNROLL
      for (int share = 1; share < SHARES; share++) total += scratch[(share * WINDOW_SUMS + i) * ITEMS + item];
      sum[i / EACH / WINDOW][i / EACH % WINDOW][i % EACH] = total;
    }
    finish(sum, item, target, winners, full);
  }
}

// full (MAPS, AREA) = derivative of the loss by the convolution's sums; errors (TARGET_SIZE,) are the target's.
__device__ __forceinline__ void spread(const float* target, const unsigned char* winners, const float* errors,
                                       float* full) {
  for (int at = threadIdx.x; at < TARGET_SIZE; at += BLOCK) {
    const int map = at / OUT_AREA, window = at % OUT_AREA;
    const int y = window / OUT_COLUMNS * WINDOW, x = window % OUT_COLUMNS * WINDOW;
    const float error = errors[at];
    // for max the target is the winner's own activated value; the losers' derivatives are not needed
    const float winning = WINDOW > 1 && METHOD == MEAN ? 0.0f : error * slope<FUNCTION>(target[at]);
    const int winner = WINDOW > 1 && METHOD == MAX ? winners[at] : 0;
UNROLL
    for (int a = 0; a < WINDOW; a++)
UNROLL
      for (int b = 0; b < WINDOW; b++) {
        float* place = full + map * AREA + (y + a) * COLUMNS + x + b;
        if (WINDOW > 1 && METHOD == MEAN)
          *place = error / float(WINDOW * WINDOW) * (KEEPS ? slope<FUNCTION>(*place) : 1.0f);
        else
          *place = a * WINDOW + b == winner ? winning : 0.0f;
      }
  }
}

__device__ __forceinline__ void clear(Sums& sums) {
UNROLL
  for (int owned = 0; owned < OWNED; owned++)
UNROLL
    for (int j = 0; j <= KERNEL; j++) sums.row[owned][j] = 0.0f;
}

// A row of the weight gradient is (map, channel, i): sums += this image's share of the thread's rows.
__device__ __forceinline__ void add_gradient(const float* source, const float* full, Sums& sums) {
  const int split = threadIdx.x % SPLITS;
UNROLL
  for (int owned = 0; owned < OWNED; owned++) {
    const int row = threadIdx.x / SPLITS + owned * (BLOCK / SPLITS);
    if (row >= GRADIENT_ROWS) break;
    const int map = row / (CHANNELS * KERNEL), channel = row / KERNEL % CHANNELS, i = row % KERNEL;
    for (int y = split; y < ROWS; y += SPLITS) {
      const float* delta = full + map * AREA + y * COLUMNS;
      const float* values = source + (channel * HEIGHT + y * STRIDE + i) * WIDTH;
      if (SHORT_ROWS) {
        // the whole row of source values in registers: each is used KERNEL times
        float value[SHORT_ROWS ? WIDTH : 1];
UNROLL
        for (int x = 0; x < WIDTH; x++) value[x] = values[x];
UNROLL
        for (int x = 0; x < COLUMNS; x++) {
          const float d = delta[x];
UNROLL
          for (int j = 0; j < KERNEL; j++)
            sums.row[owned][j] = fmaf(d, value[(x * STRIDE + j) % WIDTH], sums.row[owned][j]);
          sums.row[owned][KERNEL] += d;
        }
      } else {
        add_row_gradient<KERNEL, STRIDE>(sums.row[owned], delta, values, COLUMNS);
      }
    }
  }
}

// partial (PARAMETERS,) = weight gradient (MAPS, TERMS), then bias gradient. scratch: BLOCK * OWNED * (KERNEL + 1)
// floats if SPLITS > 1.
__device__ __forceinline__ void write_gradient(Sums& sums, float* scratch, float* partial) {
  write_gradient_rows<BLOCK, OWNED, SPLITS, KERNEL, CHANNELS, MAPS>(sums.row, threadIdx.x / SPLITS, scratch, partial);
}

// source_errors (SOURCE_SIZE,): each row of a channel is one thread's (or SENDERS threads', who share the maps), which
// takes the errors of the rows that saw it and pushes each to the KERNEL places it came from, all in registers.
// scratch: SENDERS * SOURCE_SIZE floats if SENDERS > 1.
__device__ __forceinline__ void send_rows_back(const float* full, const float* held, float* source_errors,
                                               float* scratch) {
  constexpr int LINES = CHANNELS * HEIGHT;
  for (int job = threadIdx.x; job < LINES * SENDERS; job += BLOCK) {
    const int line = job % LINES, sender = job / LINES, channel = line / HEIGHT, y = line % HEIGHT;
    float error[SHORT_ROWS ? WIDTH : 1];
UNROLL
    for (int x = 0; x < WIDTH; x++) error[x] = 0.0f;
    const int from = sender * MAPS / SENDERS, to = (sender + 1) * MAPS / SENDERS;
    for (int i = 0; i < KERNEL; i++) {
      const int above = y - i;  // first source row of the windows that saw this row with row i of the weights
      if (above < 0 || above % STRIDE || above / STRIDE >= ROWS) continue;
      for (int map = from; map < to; map++) {
        const float* delta = full + map * AREA + above / STRIDE * COLUMNS;
        const float* weight = held + (channel * KERNEL + i) * KERNEL * MAPS + map;
        float w[KERNEL];
UNROLL
        for (int j = 0; j < KERNEL; j++) w[j] = weight[j * MAPS];
UNROLL
        for (int x = 0; x < COLUMNS; x++) {
          const float d = delta[x];
UNROLL
          for (int j = 0; j < KERNEL; j++)
            error[(x * STRIDE + j) % WIDTH] = fmaf(d, w[j], error[(x * STRIDE + j) % WIDTH]);
        }
      }
    }
    float* out = (SENDERS == 1 ? source_errors : scratch + sender * SOURCE_SIZE) + line * WIDTH;
UNROLL
    for (int x = 0; x < WIDTH; x++) out[x] = error[x];
  }
  if (SENDERS == 1) return;
  __syncthreads();
  for (int unit = threadIdx.x; unit < SOURCE_SIZE; unit += BLOCK) {
    float total = scratch[unit];
UNROLL
    for (int sender = 1; sender < SENDERS; sender++) total += scratch[sender * SOURCE_SIZE + unit];
    source_errors[unit] = total;
  }
}

// The same where rows are too long for that: each source unit gathers from the units that saw it.
__device__ __forceinline__ void gather_errors(const float* full, const float* held, float* source_errors) {
  for (int unit = threadIdx.x; unit < SOURCE_SIZE; unit += BLOCK) {
    const int channel = unit / (HEIGHT * WIDTH), y = unit / WIDTH % HEIGHT, x = unit % WIDTH;
    float sum = 0.0f;
    for (int i = 0; i < KERNEL; i++) {
      const int row = y - i;
      if (row < 0 || row % STRIDE || row / STRIDE >= ROWS) continue;
      for (int j = 0; j < KERNEL; j++) {
        const int column = x - j;
        if (column < 0 || column % STRIDE || column / STRIDE >= COLUMNS) continue;
        const float* weight = held + ((channel * KERNEL + i) * KERNEL + j) * MAPS;
        const float* delta = full + row / STRIDE * COLUMNS + column / STRIDE;
        for (int map = 0; map < MAPS; map++) sum = fmaf(delta[map * AREA], weight[map], sum);
      }
    }
    source_errors[unit] = sum;
  }
}

__device__ __forceinline__ void send_back(const float* full, const float* held, float* source_errors,
                                          float* scratch) {
  if (SHORT_ROWS)
    send_rows_back(full, held, source_errors, scratch);
  else
    gather_errors(full, held, source_errors);
}
