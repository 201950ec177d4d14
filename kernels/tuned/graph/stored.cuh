// Plan `graph` of stage tuned, convolutions whose maps and errors lie in device memory as the planes that they multiply.
//
// product.cuh and gradient.cuh split numbers when they are staged: by every block that sees them, and in between two waits.
// Here each number is split once, by the kernel that makes it, and lies in device memory as vectors of eight channels, with
// the padding around the maps: (plane, group of eight, image, row, column). The rows that a tile sees are then neighbours,
// and are copied by the hardware's copy engine, into a second buffer while the first one is multiplied.
//   split_source   where the layer before leaves no planes
//   split_weights  in the order in which a block wants them, for both products
//   split_errors   errors of the convolution's sums, spread and with zeros around them as SpreadErrors has them
// Needs, beyond what layer.cuh does: BATCH, SOURCE_GROUPS, SOURCE_PITCH, ERRORS_GROUPS, ERRORS_PITCH (groups of eight in
// memory, and vectors from a row to the next), GRADIENT_ERROR_ROWS (of the errors that a chunk of positions sees).
#pragma once
#include "../../async.cuh"
#include "layer.cuh"

namespace graph {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && !defined(NO_BULK_COPIES)
#define HAS_COPY_ENGINE 1
#endif

struct Copy {
  char* target;
  const char* source;
  int bytes;  // a multiple of 16
};

// Rounds of copies to shared memory, of which two may be under way.
struct Rounds {
  unsigned long long* arrived;  // (2,) in shared memory
  unsigned begun = 0, ended = 0;

  // A barrier comes before the first wait.
  __device__ __forceinline__ explicit Rounds(unsigned long long* at) : arrived(at) {
    if (threadIdx.x == 0)
      for (int side = 0; side < 2; side++) init_bulk_copies(at + side);
  }

  // Begins the copies each(0), ..., which have `bytes` in all. All threads; a barrier is between the last use of the targets
  // and this.
  template <class Each>
  __device__ __forceinline__ void begin(int bytes, int copies, Each each) {
#ifdef HAS_COPY_ENGINE
    if (threadIdx.x < WARP) {
      BulkCopyBarrier to = {arrived + begun % 2, 0, false};
      fence_async_proxy();
      if (threadIdx.x == 0) expect_bytes(to, bytes);
      __syncwarp();
      for (int i = threadIdx.x; i < copies; i += WARP) {
        const Copy copy = each(i);
        copy_bulk(reinterpret_cast<float*>(copy.target), reinterpret_cast<const float*>(copy.source), copy.bytes / 4,
                  to);
      }
    }
#else
    for (int i = 0; i < copies; i++) {
      const Copy copy = each(i);
      copy_float4s(reinterpret_cast<float*>(copy.target), reinterpret_cast<const float*>(copy.source), copy.bytes / 16);
    }
    end_group_of_copies();
#endif
    begun++;
  }

  // Waits for the round that began first.
  __device__ __forceinline__ void wait() {
#ifdef HAS_COPY_ENGINE
    BulkCopyBarrier of = {arrived + ended % 2, ended / 2, true};
    wait_for_bulk_copies(of);
#else
    if (begun - ended > 1)
      wait_for_groups<1>();
    else
      wait_for_groups<0>();
    __syncthreads();
#endif
    ended++;
  }
};

// Where the rows of a map in device memory are. GROUPS: of eight channels; the vectors of a row are Spec::PATCH_COLUMNS.
template <class Layer, class Rows, int GROUPS>
struct StoredMap {
  using P = Planes<made_of(Layer::ARITHMETIC)>;
  static constexpr int PLANE_VECTORS = GROUPS * Layer::BATCH * Rows::Map::ROWS * Rows::ROW;

  static __device__ __forceinline__ const char* at(const unsigned* planes, int plane, int group, int row) {
    const size_t vector = static_cast<size_t>(plane) * PLANE_VECTORS +
                          static_cast<size_t>(group * Layer::BATCH * Rows::Map::ROWS + row) * Rows::ROW;
    return reinterpret_cast<const char*>(planes) + vector * P::VECTOR_BYTES;
  }

  static __device__ __forceinline__ void store(unsigned* planes, int group, int row, int column, const Eight& eight,
                                               float factor) {
    P::store(reinterpret_cast<char*>(planes), PLANE_VECTORS,
             (group * Layer::BATCH * Rows::Map::ROWS + row) * Rows::ROW + column, eight, factor);
  }
};

// A product forward or backward.
template <class Layer, class Spec, int GROUPS>
struct StoredConvolution {
  using Product = Convolution<Layer, Spec>;
  using P = typename Product::P;
  using Left = typename Product::Left;
  using Memory = StoredMap<Layer, Left, GROUPS>;
  static constexpr int M = Product::M, N = Product::N, CHUNK = Product::CHUNK, CHUNKS = Product::CHUNKS;
  static constexpr int SPLITS = Product::SPLITS, EACH = ceil_div(CHUNKS, SPLITS);
  static constexpr int TAP_ROWS = Product::TAP_ROWS, PARTS = Left::TAP_ROWS / TAP_ROWS;
  static_assert(!Spec::UNFOLD && !Spec::KEEPS_WEIGHTS, "patches are copied, and the weights of each chunk");

  // Shared memory, twice: the pixel of each row, the patch and the weights, whose place the sums take.
  static constexpr int SIDE_BYTES = larger_of(Product::LEFT_BYTES + Product::RIGHT_BYTES, Product::SUM_BYTES);
  static constexpr int BYTES = 2 * (M * 4 + SIDE_BYTES);
  static constexpr int PATCH_BYTES = Left::PIXELS * P::VECTOR_BYTES;
  static constexpr int LEFT_COPIES = CHUNK * P::COUNT;

  struct Item {
    int job, chunk, tap_row;

    __device__ __forceinline__ bool begins() const { return tap_row == 0 && chunk == job % SPLITS * EACH; }
    __device__ __forceinline__ Item next() const {
      if (tap_row + TAP_ROWS < Left::TAP_ROWS) return {job, chunk, tap_row + TAP_ROWS};
      if (chunk + 1 < min(CHUNKS, (job % SPLITS + 1) * EACH)) return {job, chunk + 1, 0};
      const int other = job + static_cast<int>(gridDim.x);
      return {other, other % SPLITS * EACH, 0};
    }
  };

  // As Convolution::multiply, from `first_job` on.
  template <class Finish>
  static __device__ __forceinline__ void multiply(char* memory, Rounds& rounds, const unsigned* __restrict__ map,
                                                  const unsigned* __restrict__ weights, float left_factor,
                                                  float right_factor, int first_job, int count,
                                                  float* __restrict__ partials, unsigned* __restrict__ tickets,
                                                  Finish finish) {
    const float back = Product::ARITHMETIC == F16X3 ? 1.0f / left_factor / right_factor : 1.0f;
    const int warp = threadIdx.x / WARP;
    const bool active = warp < Product::WARPS_M * Product::WARPS_N;
    const int row0 = warp % Product::WARPS_M * Product::M_TILES * 16;
    const int column0 = warp / Product::WARPS_M * Product::N_TILES * EIGHT;
    const int jobs = Product::tiles(count) * SPLITS;
    int* pixels = reinterpret_cast<int*>(memory);  // (2, M)
    char* sides = memory + 2 * M * 4;
    if (first_job >= jobs) return;

    const auto begin = [&](const Item& item, int turn) {
      const int tile = item.job / SPLITS, first = tile / Product::WIDE * Left::USED;
      char* side = sides + rounds.begun % 2 * SIDE_BYTES;
      const int row = Left::first_row(first), part = item.tap_row / TAP_ROWS;
      rounds.begin(LEFT_COPIES * PATCH_BYTES + Product::RIGHT_BYTES, LEFT_COPIES + 1, [&](int i) -> Copy {
        if (i == LEFT_COPIES)
          return {side + Product::LEFT_BYTES,
                  reinterpret_cast<const char*>(weights) +
                      static_cast<size_t>((tile % Product::WIDE * CHUNKS + item.chunk) * PARTS + part) *
                          Product::RIGHT_BYTES,
                  Product::RIGHT_BYTES};
        const int plane = i / CHUNK, group = i % CHUNK;
        return {side + (plane * Product::LEFT_VECTORS + group * Left::PITCH) * P::VECTOR_BYTES,
                Memory::at(map, plane, item.chunk * CHUNK + group, row), PATCH_BYTES};
      });
      if (item.begins())
        for (int i : block_range(M)) pixels[turn % 2 * M + i] = Left::pixel_of(first, i);
    };

    Item next = {first_job, first_job % SPLITS * EACH, 0};
    int turn = 0;  // of the job that has begun last
    begin(next, turn);
    Sums<Product::ARITHMETIC, Product::M_TILES, Product::N_TILES> sums;
    while (next.job < jobs) {
      const Item now = next;
      const int now_turn = turn;
      next = now.next();
      __syncthreads();
      if (next.job < jobs) {
        if (next.job != now.job) turn++;
        begin(next, turn);
      }
      char* side = sides + rounds.ended % 2 * SIDE_BYTES;
      rounds.wait();
      if (now.begins()) sums.set_zero();
      if (active)
        Product::multiply_chunk(sums, pixels + now_turn % 2 * M, side, side + Product::LEFT_BYTES, now.tap_row, 0, row0,
                                column0);
      if (next.job == now.job) continue;
      __syncthreads();
      float* results = reinterpret_cast<float*>(side);
      if (active)
        UNROLL_FOR(int m = 0; m < Product::M_TILES; m++)
          UNROLL_FOR(int n = 0; n < Product::N_TILES; n++)
            UNROLL_FOR(int i = 0; i < 4; i++)
              results[(column0 + n * EIGHT + tile_column(i)) * Product::SUM_PITCH +
                      Product::sum_at(row0 + m * 16 + tile_row(i))] = sums.result(m, n, i, back);
      __syncthreads();
      const int tile = now.job / SPLITS;
      if (SPLITS == 1 || Product::add_splits(results, partials, tickets, tile, now.job % SPLITS))
        finish(tile / Product::WIDE * Left::USED, tile % Product::WIDE * N, results);
    }
    __syncthreads();
  }
};

template <class Layer>
using StoredForward = StoredConvolution<Layer, ForwardSpec<Layer>, Layer::SOURCE_GROUPS>;
template <class Layer>
using StoredErrors = StoredConvolution<Layer, ErrorsSpec<Layer>, Layer::ERRORS_GROUPS>;

// The positions of a chunk of the gradient's sum, row by row: what they see of the source.
template <class Layer>
struct SourceRowsSpec {
  using Map = PaddedSource<Layer>;
  static constexpr int M = Layer::GRADIENT_POSITIONS;
  static constexpr int PATCH_ROWS = Layer::GRADIENT_PATCH_ROWS, PATCH_COLUMNS = Layer::SOURCE_PITCH;
  static constexpr bool UNFOLD = false;
  static constexpr int KERNEL_ROWS = Layer::KERNEL_ROWS, KERNEL_COLUMNS = Layer::KERNEL_COLUMNS;
  static constexpr int STEP_ROWS = Layer::STRIDE_ROWS, STEP_COLUMNS = Layer::STRIDE_COLUMNS;
  static constexpr int WINDOW_ROWS = 1, WINDOW_COLUMNS = 1;
  static constexpr int CELL_ROWS = Layer::OUT_ROWS * Layer::WINDOW_ROWS;
  static constexpr int CELL_COLUMNS = Layer::OUT_COLUMNS * Layer::WINDOW_COLUMNS;
};

// Likewise of the errors, which begin ABOVE rows and LEFT columns further.
template <class Layer>
struct ErrorRowsSpec : SourceRowsSpec<Layer> {
  using Map = SpreadErrors<Layer>;
  static constexpr int PATCH_ROWS = Layer::GRADIENT_ERROR_ROWS, PATCH_COLUMNS = Layer::ERRORS_PITCH;
  static constexpr int KERNEL_ROWS = 1, KERNEL_COLUMNS = 1;
};

// The weight gradient, as Gradient has it.
template <class Layer>
struct StoredGradient {
  using Plain = Gradient<Layer>;
  using P = typename Plain::P;
  using Left = Patch<ErrorRowsSpec<Layer>>;
  using Right = Patch<SourceRowsSpec<Layer>>;
  using LeftMemory = StoredMap<Layer, Left, Layer::ERRORS_GROUPS>;
  using RightMemory = StoredMap<Layer, Right, Layer::SOURCE_GROUPS>;
  static constexpr int ARITHMETIC = Plain::ARITHMETIC, M = Plain::M, M_TILES = Plain::M_TILES;
  static constexpr int N_TILES = Plain::N_TILES, COLUMN_TILES = Plain::COLUMN_TILES, WARPS_M = Plain::WARPS_M;
  static constexpr int GROUPS = Plain::GROUPS, POSITIONS = Plain::POSITIONS, WIDE = Plain::WIDE, HIGH = Plain::HIGH;
  static_assert(Right::USED == POSITIONS && Left::USED == POSITIONS, "a chunk has as many positions as it stages");

  // Shared memory, twice: the pixels of the positions in both patches, the errors with a vector of zeros behind each group,
  // and the source with a group of ones.
  static constexpr int LEFT_PITCH = (Left::PIXELS + 1) | 1, LEFT_VECTORS = M / EIGHT * LEFT_PITCH;
  static constexpr int RIGHT_VECTORS = (GROUPS + 1) * Right::PITCH;
  static constexpr int LEFT_BYTES = LEFT_VECTORS * P::COUNT * P::VECTOR_BYTES;
  static constexpr int SIDE_BYTES =
      ceil_div(larger_of(LEFT_BYTES + RIGHT_VECTORS * P::COUNT * P::VECTOR_BYTES, Plain::SUM_BYTES), 16) * 16;
  static constexpr int BYTES = 2 * (2 * POSITIONS * 4 + SIDE_BYTES);
  static constexpr int LEFT_COPIES = M / EIGHT * P::COUNT, RIGHT_COPIES = GROUPS * P::COUNT;
  static constexpr int LEFT_COPY = Left::PIXELS * P::VECTOR_BYTES, RIGHT_COPY = Right::PIXELS * P::VECTOR_BYTES;

  struct Item {
    int job, chunk;
  };

  static __device__ __forceinline__ void run(char* memory, Rounds& rounds, const unsigned* __restrict__ errors,
                                             const unsigned* __restrict__ source, float* __restrict__ partials,
                                             float factor, int count, int groups) {
    const float back = ARITHMETIC == F16X3 ? 1.0f / factor / Range::MAPS : 1.0f;
    const int warp = threadIdx.x / WARP, tile0 = warp / WARPS_M * N_TILES, row0 = warp % WARPS_M * M_TILES * 16;
    const int positions = count * Right::CELLS, chunks = ceil_div(positions, POSITIONS);
    int* pixels = reinterpret_cast<int*>(memory);  // (2, errors and source, POSITIONS)
    char* sides = memory + 4 * POSITIONS * 4;
    if (static_cast<int>(blockIdx.x) >= Plain::jobs(groups)) return;
    for (int side = 0; side < 2; side++) stage_constants(sides + side * SIDE_BYTES);

    const auto first_of = [&](int job) { return Plain::start_of_group(job / (WIDE * HIGH), groups, chunks); };
    const auto begin = [&](const Item& item) {
      const int side = rounds.begun % 2, first = item.chunk * POSITIONS;
      char* left = sides + side * SIDE_BYTES;
      const int group = item.job % WIDE * GROUPS, map_group = item.job / WIDE % HIGH * (M / EIGHT);
      const int error_row = Left::first_row(first) + SpreadErrors<Layer>::ABOVE, row = Right::first_row(first);
      rounds.begin(LEFT_COPIES * LEFT_COPY + RIGHT_COPIES * RIGHT_COPY, LEFT_COPIES + RIGHT_COPIES, [&](int i) -> Copy {
        if (i < LEFT_COPIES) {
          const int plane = i / (M / EIGHT), own = i % (M / EIGHT);
          return {left + (plane * LEFT_VECTORS + own * LEFT_PITCH) * P::VECTOR_BYTES,
                  LeftMemory::at(errors, plane, map_group + own, error_row), LEFT_COPY};
        }
        const int plane = (i - LEFT_COPIES) / GROUPS, own = (i - LEFT_COPIES) % GROUPS;
        return {left + LEFT_BYTES + (plane * RIGHT_VECTORS + own * Right::PITCH) * P::VECTOR_BYTES,
                RightMemory::at(source, plane, group + own, row), RIGHT_COPY};
      });
      int* own = pixels + side * 2 * POSITIONS;
      for (int i : block_range(POSITIONS)) {
        // Beyond the last position the errors are zero, and the source is that of a position that exists.
        const bool there = first + i < positions;
        own[i] = there ? Left::pixel_of(first, i) + SpreadErrors<Layer>::LEFT : Left::PIXELS;
        own[POSITIONS + i] = there ? Right::pixel_of(first, i) : Right::pixel_of(first, 0);
      }
    };
    const auto after = [&](const Item& item) -> Item {
      if (item.chunk + 1 < first_of(item.job + WIDE * HIGH)) return {item.job, item.chunk + 1};
      const int other = item.job + static_cast<int>(gridDim.x);
      return {other, first_of(other)};
    };

    // The job itself, or the next one of this block that has a chunk: with few images some groups have none, and are zero.
    const auto found = [&](Item item) -> Item {
      while (item.job < Plain::jobs(groups) && item.chunk >= first_of(item.job + WIDE * HIGH)) {
        for (int i : block_range(M * Plain::COLUMN_TILES * EIGHT))
          Plain::write(partials + item.job / (WIDE * HIGH) * Plain::PARAMETERS,
                       item.job / WIDE % HIGH * M + i / EIGHT / Plain::COLUMN_TILES, i / EIGHT % Plain::COLUMN_TILES,
                       i % EIGHT, item.job % WIDE * GROUPS, 0.0f);
        item.job += static_cast<int>(gridDim.x);
        item.chunk = first_of(item.job);
      }
      return item;
    };

    Sums<ARITHMETIC, M_TILES, N_TILES> sums;
    sums.set_zero();
    Item next = found({static_cast<int>(blockIdx.x), first_of(blockIdx.x)});
    if (next.job < Plain::jobs(groups)) begin(next);
    while (next.job < Plain::jobs(groups)) {
      const Item now = next;
      next = found(after(now));
      __syncthreads();
      if (next.job < Plain::jobs(groups)) begin(next);
      const int side = rounds.ended % 2;
      char* left = sides + side * SIDE_BYTES;
      rounds.wait();
      const int* own = pixels + side * 2 * POSITIONS;
      multiply_positions<StoredGradient>(
          sums, [&](int k) { return own[k]; }, own + POSITIONS, left, left + LEFT_BYTES, row0, tile0);
      if (next.job == now.job) continue;
      __syncthreads();
      Plain::leave(sums, reinterpret_cast<float*>(left), partials + now.job / (WIDE * HIGH) * Plain::PARAMETERS,
                   now.job / WIDE % HIGH * M, now.job % WIDE * GROUPS, row0, tile0, back);
      if (Plain::REORDERS && next.job < Plain::jobs(groups)) {
        __syncthreads();
        stage_constants(left);
      }
      sums.set_zero();
    }
    __syncthreads();
  }

  // What no copy touches: a 1 in the first vector of each pixel of the last group, and zeros behind the errors.
  static __device__ __forceinline__ void stage_constants(char* left) {
    for (int pixel : block_range(Right::PIXELS)) {
      Eight eight = eight_zeros();
      eight.at[0] = 1.0f;
      P::store(left + LEFT_BYTES, RIGHT_VECTORS, GROUPS * Right::PITCH + pixel, eight, Range::MAPS);
    }
    for (int group : block_range(M / EIGHT))
      P::store(left, LEFT_VECTORS, group * LEFT_PITCH + Left::PIXELS, eight_zeros(), 1.0f);
  }
};

// planes of the source (count, CHANNELS, HEIGHT, WIDTH).
template <class Layer>
__device__ __forceinline__ void split_source(const float* __restrict__ source, unsigned* __restrict__ planes,
                                             int count) {
  using Memory = StoredMap<Layer, Patch<ForwardSpec<Layer>>, Layer::SOURCE_GROUPS>;
  using Map = PaddedSource<Layer>;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const Map map = {source, count};
  for (int i : grid_range(ceil_div(Layer::CHANNELS, EIGHT) * count * Map::AREA)) {
    const int place = i % Map::AREA, image = i / Map::AREA % count, group = i / Map::AREA / count;
    const int y = place / Map::WIDTH + Map::PADDING_ROWS, x = place % Map::WIDTH + Map::PADDING_COLUMNS;
    Memory::store(planes, group, image * Map::ROWS + y, x, map.load(image, y, x, group * EIGHT), Range::MAPS);
  }
}

// What split_weights below knows of one product's weights, as a row of integers: cnnlib/stages/tuned/graph/stored.py.
struct SplitJob {
  int first;             // vector, over all jobs
  int weights;           // where the layer's weights begin, in floats
  int split;             // where the planes begin, in vectors of all planes
  int columns, terms;    // of the product: maps and channels forward, channels and maps backward
  int width, chunk;      // columns of a tile and groups of eight terms that a block copies together
  int pitch, tap_pitch;  // vectors from a group to the next, and from a tap to the next
  int chunks, parts;     // how many chunks there are, and in how many parts the rows of the kernel are copied
  int taps, area;        // of a part, and of the kernel
  int column, term;      // floats from a column to the next, and from a term to the next
  int turned;            // whether the kernel is turned around
};

// Splits the weights of all stored layers, by one launch. jobs (count): SplitJobs.
template <class Layer>
__device__ __forceinline__ void split_weights(const int* __restrict__ jobs, int count,
                                              const float* __restrict__ parameters, unsigned* __restrict__ split,
                                              int vectors) {
  using P = Planes<Convolution<Layer, ForwardSpec<Layer>>::ARITHMETIC>;
  constexpr int FIELDS = sizeof(SplitJob) / 4;
  wait_for_previous_kernel();
  let_next_kernel_start();
  for (int i : grid_range(vectors)) {
    int number = 0;
    while (number + 1 < count && jobs[(number + 1) * FIELDS] <= i) number++;
    const SplitJob job = reinterpret_cast<const SplitJob*>(jobs)[number];
    const int part_vectors = job.taps * job.tap_pitch;
    const int part = (i - job.first) / part_vectors, own = (i - job.first) % part_vectors;
    const int n = own % job.tap_pitch % job.pitch, staged = own % job.tap_pitch / job.pitch;
    const int tap = own / job.tap_pitch + part % job.parts * job.taps;
    const int term = (part / job.parts % job.chunks * job.chunk + staged) * EIGHT;
    const int column = part / job.parts / job.chunks * job.width + n;
    Eight eight = eight_zeros();
    if (n < job.width && staged < job.chunk && column < job.columns) {
      const float* from =
          parameters + job.weights + column * job.column + term * job.term + (job.turned ? job.area - 1 - tap : tap);
      UNROLL_FOR(int e = 0; e < EIGHT; e++)
        if (term + e < job.terms) eight.at[e] = from[e * job.term];
    }
    P::store(reinterpret_cast<char*>(split) +
                 static_cast<size_t>(job.split + part * part_vectors) * P::COUNT * P::VECTOR_BYTES,
             part_vectors, own, eight, Range::WEIGHTS);
  }
}

// planes of the errors of the convolution's sums. What lies between and around them is zero and stays so.
template <class Layer>
__device__ __forceinline__ void split_errors(const SumErrors<Layer>& errors, const unsigned* __restrict__ peak,
                                             unsigned* __restrict__ planes) {
  using Memory = StoredMap<Layer, Patch<ErrorsSpec<Layer>>, Layer::ERRORS_GROUPS>;
  using Of = SumErrors<Layer>;
  using Spread = SpreadErrors<Layer>;
  SHARED(unsigned, largest, 1);
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int count = errors.count;
  const float factor = factor_of_errors<Layer>(largest, errors.errors, peak, count);
  // A thread has a column of a window, so that neighbours write neighbours: vectors by themselves take a write of 32 bytes.
  for (int i : grid_range(ceil_div(Of::MAPS, EIGHT) * count * Of::CELL_ROWS * Of::COLUMNS)) {
    const int x = i % Of::COLUMNS, row = i / Of::COLUMNS % Of::CELL_ROWS;
    const int image = i / Of::COLUMNS / Of::CELL_ROWS % count;
    const int map = i / Of::COLUMNS / Of::CELL_ROWS / count * EIGHT;
    const int at = Of::cell(image, map, row, x / Of::WINDOW_COLUMNS);
    const Eight eight = errors.load_cells(at, map);
    int winner[EIGHT];
    errors.load_winners(winner, at, map);
    UNROLL_FOR(int own = 0; own < Of::WINDOW_ROWS; own++) {
      const int y = row * Of::WINDOW_ROWS + own, element = own * Of::WINDOW_COLUMNS + x % Of::WINDOW_COLUMNS;
      Memory::store(planes, map / EIGHT, image * Spread::ROWS + y * Layer::STRIDE_ROWS + Spread::ABOVE,
                    x * Layer::STRIDE_COLUMNS + Spread::LEFT, Of::share(eight, winner, element), factor);
    }
  }
}

template <class Layer>
__device__ __forceinline__ void stored_forward(const unsigned* __restrict__ source, const unsigned* __restrict__ weight,
                                               const float* __restrict__ bias, float* __restrict__ target,
                                               unsigned char* __restrict__ winners, unsigned* __restrict__ planes,
                                               float* __restrict__ partials, unsigned* __restrict__ tickets,
                                               unsigned* __restrict__ peak, int seed_low, int seed_high,
                                               const int* __restrict__ now, int count) {
  static_assert(StoredForward<Layer>::BYTES <= Layer::FORWARD_BYTES, "the launch asks for enough shared memory");
  SHARED_LARGE(char, memory, Layer::FORWARD_BYTES);
  SHARED(unsigned long long, arrived, 2);
  Rounds rounds(arrived);
  __syncthreads();
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (blockIdx.x == 0 && threadIdx.x == 0) *peak = 0;  // of the errors that come back later
  Moment moment(seed_low, seed_high, 0, false);
  if constexpr (Layer::DROPS) moment = Moment(seed_low, seed_high, now);
  StoredForward<Layer>::multiply(memory, rounds, source, weight, Range::MAPS, Range::WEIGHTS, blockIdx.x, count,
                                 partials, tickets, [&](int first, int first_map, const float* sums) {
                                   Forward<Layer>::finish(first, first_map, sums, bias, target, winners, planes, moment,
                                                          count);
                                 });
}

// Both products of the backward pass in one launch, as `backward` of layer.cuh has them.
template <class Layer>
__device__ __forceinline__ void stored_backward(const float* __restrict__ errors, const unsigned* __restrict__ planes,
                                                const unsigned* __restrict__ source,
                                                const unsigned* __restrict__ weight, float* __restrict__ source_errors,
                                                unsigned* __restrict__ source_peak, float* __restrict__ sums,
                                                float* __restrict__ partials, unsigned* __restrict__ tickets,
                                                const unsigned* __restrict__ peak, int count, int groups) {
  static_assert(StoredErrors<Layer>::BYTES <= Layer::BACKWARD_BYTES, "the launch asks for enough shared memory");
  static_assert(StoredGradient<Layer>::BYTES <= Layer::BACKWARD_BYTES, "the launch asks for enough shared memory");
  SHARED_LARGE(char, memory, Layer::BACKWARD_BYTES);
  SHARED(unsigned long long, arrived, 2);
  SHARED(unsigned, largest, 1);
  Rounds rounds(arrived);
  __syncthreads();
  wait_for_previous_kernel();
  let_next_kernel_start();
  const float factor = factor_of_errors<Layer>(largest, errors, peak, count);
  StoredGradient<Layer>::run(memory, rounds, planes, source, sums, factor, count, groups);
  unsigned found = 0;
  StoredErrors<Layer>::multiply(memory, rounds, planes, weight, factor, Range::WEIGHTS,
                                first_job_after(Gradient<Layer>::jobs(groups)), count, partials, tickets,
                                [&](int first, int first_channel, const float* results) {
                                  Errors<Layer>::finish(first, first_channel, results, source_errors, found, count);
                                });
  Errors<Layer>::leave_peak(source_peak, found);
}

}  // namespace graph

#define TUNED_GRAPH_STORED_KERNELS(layer)                                                                              \
  ENTRY_POINT_BOUNDED(layer, split_source, layer::THREADS)                                                             \
  (const float* __restrict__ source, unsigned* __restrict__ planes, int count) {                                       \
    graph::split_source<layer>(source, planes, count);                                                                 \
  }                                                                                                                    \
  ENTRY_POINT_BOUNDED(layer, split_weights, layer::THREADS)                                                            \
  (const int* __restrict__ jobs, int count, const float* __restrict__ parameters, unsigned* __restrict__ split,        \
   int vectors) {                                                                                                      \
    graph::split_weights<layer>(jobs, count, parameters, split, vectors);                                              \
  }                                                                                                                    \
  ENTRY_POINT_RESIDENT(layer, forward, layer::THREADS, 2)                                                              \
  (const unsigned* __restrict__ source, const unsigned* __restrict__ weight, const float* __restrict__ bias,           \
   float* __restrict__ target, unsigned char* __restrict__ winners, unsigned* __restrict__ planes,                     \
   float* __restrict__ partials, unsigned* __restrict__ tickets, unsigned* __restrict__ peak, int seed_low,            \
   int seed_high, const int* __restrict__ moment, int count) {                                                         \
    graph::stored_forward<layer>(source, weight, bias, target, winners, planes, partials, tickets, peak, seed_low,     \
                                 seed_high, moment, count);                                                            \
  }                                                                                                                    \
  TUNED_GRAPH_FIND_PEAK(layer)                                                                                         \
  ENTRY_POINT_BOUNDED(layer, split_errors, layer::THREADS)                                                             \
  (const float* __restrict__ errors, const float* __restrict__ target, const unsigned char* __restrict__ winners,      \
   const unsigned* __restrict__ peak, unsigned* __restrict__ planes, int count) {                                      \
    graph::split_errors<layer>({errors, target, winners, count}, peak, planes);                                        \
  }                                                                                                                    \
  ENTRY_POINT_RESIDENT(layer, backward, layer::THREADS, 2)                                                             \
  (const float* __restrict__ errors, const unsigned* __restrict__ planes, const unsigned* __restrict__ source,         \
   const unsigned* __restrict__ weight, float* __restrict__ source_errors, unsigned* __restrict__ source_peak,         \
   float* __restrict__ sums, float* __restrict__ partials, unsigned* __restrict__ tickets,                             \
   const unsigned* __restrict__ peak, int count, int groups) {                                                         \
    graph::stored_backward<layer>(errors, planes, source, weight, source_errors, source_peak, sums, partials, tickets, \
                                  peak, count, groups);                                                                \
  }
