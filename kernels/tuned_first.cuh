// Stage tuned: the convolution that the image itself goes into, with stride 1; else as tuned_conv.cuh. The image stays
// bytes, which BF16 holds exactly, and what normalises it is done to the sums:
//   sum of weight (byte - mean) / deviation = (sum of weight byte - mean sum of weight) / deviation,
// and so for the gradient, where deltas are in the weights' place.
// The image is words: each pixel and the one behind it as two BF16, so that any two neighbours are one load.
// Needs what tuned_conv.cuh needs but SENDERS, and TERM_PITCH (words from a map's weights to the next one's).
#include "tuned_maps.cuh"

// Pairs of neighbours along a row: of weights forward, of positions for the gradient. A row's last may be half empty.
constexpr int WEIGHT_PAIRS = (KERNEL + 1) / 2, TERM_PAIRS = CHANNELS * KERNEL * WEIGHT_PAIRS;
constexpr int COLUMN_PAIRS = (COLUMNS + 1) / 2, AREA_PAIRS = ROWS * COLUMN_PAIRS;
constexpr int TERM_SIXTEENTHS = (TERM_PAIRS + 7) / 8, AREA_SIXTEENTHS = (AREA_PAIRS + 7) / 8;

// held: words (3, MAPS, TERM_PITCH) of the weights, then (MAPS,) what is added to the sums. raw: the parameters, in
// shared memory
__device__ __forceinline__ void hold(const float* raw, float* held, float mean, float deviation) {
  unsigned* words = reinterpret_cast<unsigned*>(held);
#pragma unroll 1
  for (int i = threadIdx.x; i < MAPS * TERM_SIXTEENTHS * 8; i += BLOCK) {
    const int map = i / (TERM_SIXTEENTHS * 8), pair = i % (TERM_SIXTEENTHS * 8);
    const int row = pair / WEIGHT_PAIRS, column = pair % WEIGHT_PAIRS * 2;
    const float* weight = raw + map * TERMS + row * KERNEL + column;
    const Pair two = {pair < TERM_PAIRS ? weight[0] : 0.0f,
                     pair < TERM_PAIRS && column + 1 < KERNEL ? weight[1] : 0.0f};
    unsigned cut[3];
    split_bf16x3(two, cut);
UNROLL
    for (int part = 0; part < 3; part++) words[(part * MAPS + map) * TERM_PITCH + pair] = cut[part];
  }
  // by the last threads, which have less to do above
  for (int map = BLOCK - 1 - threadIdx.x; map < MAPS; map += BLOCK) {
    float weights = 0.0f;
#pragma unroll 5
    for (int term = 0; term < TERMS; term++) weights += raw[map * TERMS + term];
    held[3 * MAPS * TERM_PITCH + map] = raw[MAPS * TERMS + map] - mean / deviation * weights;
  }
}

// image: words (CHANNELS, HEIGHT, WIDTH) -> target (TARGET_SIZE,). scratch: MAPS * FULL_PITCH floats.
__device__ __forceinline__ void forward(const float* image, const float* held, float* target, unsigned char* winners,
                                        float* full, float* scratch, float deviation) {
  static_assert(SHARES == 1, "there are few terms");
  constexpr int TASKS = (POSITION_TILES + DOWN - 1) / DOWN;
  const unsigned* pixels = reinterpret_cast<const unsigned*>(image);
  const unsigned* weights = reinterpret_cast<const unsigned*>(held);
  for (int task = thread_rank() / 32; task < TASKS; task += WARPS) {
    const int position0 = task * DOWN * 16;
    Fragment sum[DOWN][ACROSS];
    clear(sum);
UNROLL
    for (int sixteenth = 0; sixteenth < TERM_SIXTEENTHS; sixteenth++)
      mma_bf16x3(
          sum,
          [&](int m, int row, int pair) {
            const int position = min(position0 + m * 16 + row, AREA - 1);
            const int term = min(sixteenth * 8 + pair, TERM_PAIRS - 1);
            const int line = term / WEIGHT_PAIRS, column = term % WEIGHT_PAIRS * 2;
            return pixels[position / COLUMNS * WIDTH + position % COLUMNS +
                          (line / KERNEL * HEIGHT + line % KERNEL) * WIDTH + column];
          },
          [&](int n, int pair, int map, unsigned (&words)[3]) {
UNROLL
            for (int part = 0; part < 3; part++)
              words[part] = weights[(part * MAPS + min(n * 8 + map, MAPS - 1)) * TERM_PITCH + sixteenth * 8 + pair];
          });
    put_sums(sum, position0, scratch);
  }
  team_barrier();
  finish(held + 3 * MAPS * TERM_PITCH, target, winners, full, scratch, 1.0f / deviation);
}

// sums += this image's share: deltas x bytes and, as the last term, deltas.
__device__ __forceinline__ void add_gradient(const float* image, const float* full, Sums& sums) {
  const int split = own_split(), term0 = first_term();
  if (split >= SPLITS) return;
  const unsigned* pixels = reinterpret_cast<const unsigned*>(image);
#pragma unroll 2
  for (int sixteenth = split; sixteenth < AREA_SIXTEENTHS; sixteenth += SPLITS)
    mma_bf16x3(
        sums.tile,
        [&](int m, int row, int pair) {
          const int term = term0 + m * 16 + row, known = min(term, TERMS - 1);
          const int at = min(sixteenth * 8 + pair, AREA_PAIRS - 1);
          const unsigned two =
              pixels[(known / (KERNEL * KERNEL) * HEIGHT + known / KERNEL % KERNEL) * WIDTH + known % KERNEL +
                     at / COLUMN_PAIRS * WIDTH + at % COLUMN_PAIRS * 2];
          return term == TERMS ? TWO_ONES : two;
        },
        [&](int n, int pair, int map, unsigned (&words)[3]) {
          const int at = sixteenth * 8 + pair, column = at % COLUMN_PAIRS * 2;
          const float* delta = full + min(n * 8 + map, MAPS - 1) * FULL_PITCH + at / COLUMN_PAIRS * COLUMNS + column;
          Pair two = {0.0f, 0.0f};
          if (at < AREA_PAIRS) {
            if (COLUMNS % 2 == 0 && FULL_PITCH % 2 == 0)
              two = *reinterpret_cast<const Pair*>(delta);
            else
              two = {delta[0], column + 1 < COLUMNS ? delta[1] : 0.0f};
          }
          split_bf16x3(two, words);
        });
}

// partial (PARAMETERS,) = weight gradient (MAPS, TERMS), then bias gradient.
// scratch: as put_gradient left it, and a barrier after that. All threads of the block.
__device__ __forceinline__ void write_gradient(const float* scratch, float* partial, float mean,
                                               float deviation) {
  for (int i = threadIdx.x; i < PARAMETERS; i += BLOCK) {
    const int map = i < MAPS * TERMS ? i / TERMS : i - MAPS * TERMS;
    const float deltas = total_of(scratch, map, TERMS);
    partial[i] = i < MAPS * TERMS ? (total_of(scratch, map, i % TERMS) - mean * deltas) / deviation : deltas;
  }
}
