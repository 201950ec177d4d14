// Stage tuned: whole training steps in one launch, by blocks that stay (a persistent kernel).
//
// A step has two phases, with a barrier of the whole grid after each.
//   forward_backward  Every block takes its images through the network alone, forward and back, with the weights in its
//                     shared memory, and leaves what the gradient needs: dense layers' sources and deltas (a trace an
//                     image), and its own sum of the convolutions' gradient (a partial sum a block).
//   update            Every block sums the gradient of its share of the weights over the batch, in a fixed order, and
//                     updates them.
// Up to the first dense layer each team of a block takes one image at a time, so that one team computes while another
// waits; from there on the block takes IMAGES together.
//
// The generated unit (`python -m cnnlib show-source --stage tuned`) has numbers alone: a struct for each layer, one for
// the plan, and the list of the layers:
//   using PerImage = tuned::PerImage<tuned::ByteConv<conv1, plan::Threads>, tuned::Conv<conv2, plan::Threads>>;
//   using PerBatch = tuned::PerBatch<tuned::Dense<dense1, plan::Threads>>;
//   using Net = tuned::Network<plan, PerImage, PerBatch>;
//   TUNED_ENTRY_POINTS(Net)
// Plan has:
//   Threads (team.cuh), IMAGES (that a block takes together), IMAGE_SIZE, CHANNELS, WIDTH, CLASSES
//   BORDER_ROWS, BORDER_COLUMNS: of zeros around the image where it lies in shared memory
//   LOSS (enum Loss), WEIGHT_DECAY (a float)
//   BYTES: the first layer takes pixels as two numbers a word, FP16 if PLANES and else BF16; without it, it takes
//     normalised floats
//   KEPT: floats of an image that lie at the beginning of shared memory from forward to backward
//   SLOTS: places of that size, used in turn
//   TRACE, PARTIALS: floats of an image's trace, and of a block's partial sums
//   SHARED_BYTES, SHUFFLE_ROUNDS
//   Buffers: Image, Logits, Errors, Labels, BulkCopies (the barrier of bulk copies)
#pragma once
#include "../shuffle.cuh"
#include "byte_conv.cuh"
#include "byte_plane_conv.cuh"
#include "context.cuh"
#include "conv.cuh"
#include "dense.cuh"
#include "dropout.cuh"
#include "elementwise.cuh"
#include "grid.cuh"
#include "losses.cuh"
#include "network.cuh"
#include "plane_conv.cuh"
#include "stamps.cuh"
#include "step_inputs.cuh"

namespace tuned {

enum Mode { TRAIN, ONLY_FORWARD, GIVEN_ERRORS };

// What a block has from one step to the next.
template <class Net>
struct Block {
  NextImage<typename Net::Plan> next_image;
  BulkCopyBarrier bulk_copies;

  // All threads, when a launch begins.
  __device__ __forceinline__ Block(const Step& step, float* shared, int steps) {
    bulk_copies = {reinterpret_cast<unsigned long long*>(Net::Plan::BulkCopies::all(shared)), 0, false};
    if (threadIdx.x == 0) init_bulk_copies(bulk_copies.arrived);
    Net::prepare(shared);
    next_image.begin(step, steps);
    __syncthreads();
  }
};

// What is kept of an image, to and from device memory; all threads of a team.
template <class Plan>
__device__ __forceinline__ void put_away(const float* kept, float* stash) {
  for (int i = Plan::Threads::thread_rank(); i < Plan::KEPT / 4; i += Plan::Threads::TEAM)
    reinterpret_cast<Float4*>(stash)[i] = reinterpret_cast<const Float4*>(kept)[i];
}
template <class Plan>
__device__ __forceinline__ void take_out(const float* stash, float* kept) {
  for (int i = Plan::Threads::thread_rank(); i < Plan::KEPT / 4; i += Plan::Threads::TEAM)
    copy_async(reinterpret_cast<Float4*>(kept) + i, reinterpret_cast<const Float4*>(stash) + i);
}

// The first phase. block.next_image is the team's first image, if it has any, and in the end its first of the next
// step.
template <class Net, class Timer, class Exchange>
__device__ __forceinline__ void forward_backward(const Step& step, int mode, float* shared, Block<Net>& block,
                                                 Timer timer, Exchange exchange) {
  using Plan = typename Net::Plan;
  using Threads = typename Net::Threads;
  constexpr int IMAGES = Plan::IMAGES, TEAMS = Threads::TEAMS, SLOTS = Plan::SLOTS, KEPT = Plan::KEPT;
  constexpr int CLASSES = Plan::CLASSES;
  const int grid = gridDim.x;
  if (static_cast<int>(blockIdx.x) >= step.count) return;
  timer.mark(-1);
  const float share = 1.0f / float(step.count);
  typename Net::Accumulators sums;
  sums.clear();
  const Moment moment(step.seed_low, step.seed_high, step.number, mode != ONLY_FORWARD);
  Context<Timer, typename Exchange::Row> c = {
      shared, step.parameters, step.levels, block.bulk_copies, timer, {}, 0, 0, moment, 0};
  Net::ask_for_weights(c, exchange);
  // A block with one image puts it in its place first and then waits for them. Others have too few registers for that.
  if (IMAGES > 1) Net::take_weights(c, exchange);
  int* labels = reinterpret_cast<int*>(Plan::Labels::all(shared));
  // What is kept of an image lies first of all, in SLOTS places by turns, so that one image comes or goes while the
  // other is worked on.
  const auto kept = [&](int i) { return shared + i % SLOTS * KEPT; };
  float* stash = step.stash + static_cast<long long>(blockIdx.x) * IMAGES * KEPT;
  for (int first = blockIdx.x; first < step.count; first += grid * IMAGES) {
    const int here = min(IMAGES, (step.count - first + grid - 1) / grid);
    c.first = first;
    const int rounds = (here + TEAMS - 1) / TEAMS;
    for (int round = 0; round < rounds; round++) {
      const int i = round * TEAMS + Threads::team();
      block.next_image.arrive(step, i < here, Plan::Image::image(shared, i), labels + i);
      if (i < here) block.next_image.fetch(step);
      if (IMAGES == 1 && first == static_cast<int>(blockIdx.x)) Net::take_weights(c, exchange);
      Threads::template team_barrier<Step>();
      timer.mark(INPUT);
      Net::forward_image(c, i, exchange);
      // the last ones stay where they are
      if constexpr (SLOTS < IMAGES)
        if (i + SLOTS < rounds * TEAMS && mode != ONLY_FORWARD) put_away<Plan>(kept(i), stash + i * KEPT);
    }
    Net::forward_images(c);
    for (int i = threadIdx.x / 32; i < here; i += Threads::WARPS) {
      const int image = first + i * grid, lane = threadIdx.x % 32;
      const float* logits = Plan::Logits::image(shared, i);
      float* errors = Plan::Errors::image(shared, i);
      float* outputs = step.outputs + image * CLASSES;
      if (mode == ONLY_FORWARD)
        for (int k = lane; k < CLASSES; k += 32) outputs[k] = logits[k];
      else if (mode == GIVEN_ERRORS)
        for (int k = lane; k < CLASSES; k += 32) errors[k] = outputs[k];
      else if (Plan::LOSS == MEAN_SQUARED_ERROR)
        mean_squared_error<CLASSES>(logits, labels[i], share, errors, step.losses + image);
      else
        softmax_cross_entropy<CLASSES>(logits, labels[i], share, errors, step.losses + image);
    }
    __syncthreads();
    timer.mark(LOSS);
    if (mode == ONLY_FORWARD) continue;
    c.trace = exchange.traces() + static_cast<long long>(first) * Plan::TRACE;
    c.trace_stride = grid * Plan::TRACE, c.here = here;
    Net::backward_images(c, sums);
    for (int round = rounds - 1; round >= 0; round--) {
      const int i = round * TEAMS + Threads::team();
      if constexpr (SLOTS < IMAGES)
        if (i + SLOTS < rounds * TEAMS) {
          wait_for_groups<SLOTS / TEAMS - 1>();
          Threads::template team_barrier<Gradients>();
          timer.mark(INPUT);
        }
      Net::backward_image(c, i, sums);
      if constexpr (SLOTS < IMAGES) {
        if (i >= SLOTS) take_out<Plan>(stash + (i - SLOTS) * KEPT, kept(i));
        end_group_of_copies();
      }
    }
  }
  if (mode == ONLY_FORWARD) return;
  __syncthreads();
  Net::store_gradient(c, sums, exchange.partials() + blockIdx.x * Plan::PARTIALS);
  timer.mark(LEAVE);
}

template <class Net, class Timer>
__device__ __forceinline__ void forward_backward(const Step& step, int mode, float* shared, Block<Net>& block,
                                                 Timer timer) {
  forward_backward<Net>(step, mode, shared, block, timer, BehindBarriers{step});
}

// The second phase.
template <class Net>
__device__ __forceinline__ void update(const Step& step, const Update& how, float* shared) {
  Gradients gradients = {step.traces, step.partials, step.count, groups_of(step.count)};
  for (int tile = blockIdx.x; tile < Net::TILES; tile += gridDim.x) Net::reduce_tile(tile, gradients, shared, how);
}

// A launch whose blocks do not all come leaves a loss that is no number, so that the host has to look for the reason
// only where it finds one.
__device__ __forceinline__ void give_up(const Step& step) {
  if (threadIdx.x == 0) step.losses[0] = NAN;
}

// The second phase, where no barrier stands between the phases, by the blocks without an image. Dense layers' tiles come
// first, since what they need comes first.
template <class Net>
__device__ __forceinline__ void update_stamped(StampedGradients& gradients, const Update& how, float* shared) {
  const int workers = gridDim.x - gradients.count, worker = static_cast<int>(blockIdx.x) - gradients.count;
  if (worker < 0) return;
  if constexpr (Net::BATCH_TILES > 0)
#pragma unroll 1
    for (int tile = worker; tile < Net::BATCH_TILES; tile += workers) {
      Net::reduce_batch_tile(tile, gradients, shared, how);
      if (threadIdx.x == 0) add_release(gradients.from.dense_tiles);
    }
#pragma unroll 1
  for (int tile = workers - 1 - worker; tile < Net::IMAGE_TILES; tile += workers)
    Net::reduce_image_tile(tile, gradients, shared, how);
}

// Whole steps without a barrier of the grid. A block may be a step ahead of another, but no number is overwritten before
// all have read it: a block stamps a step's traces and sums when it has all weights of the step before, for which all of
// that step's numbers had been read.
template <class Net, class Marks>
__device__ __forceinline__ void train_stamped(Step& step, float* shared, float* velocity, const float* learning_rates,
                                              float momentum, int steps, const Handed& handed, unsigned stamp,
                                              Marks marks) {
  static_assert(Net::Plan::PARTIALS > 0, "convolutions' weights come stamped");
  static_assert(Net::Plan::IMAGES == 1 && Net::Threads::TEAMS == 1, "a block has one image at most");
  static_assert(Net::ONE_WARP_COPIES, "dense layers' weights lie in shared memory as they do in device memory");
  Block<Net> block(step, shared, steps);
  Patience patience = {handed.failed, false};
  for (int s = 0; s < steps; s++, step.order += step.count, step.number++, stamp++) {
    const float learning_rate = learning_rates[s];  // asked for long before it is needed
    marks.mark(-1);
    forward_backward<Net>(step, TRAIN, shared, block, marks, ByStamps{handed, stamp, s, s == 0, patience});
    marks.mark(Net::WAIT);
    StampedGradients gradients = {handed, stamp, step.count, step.count, patience};
    update_stamped<Net>(gradients,
                        {step.parameters, velocity, nullptr, learning_rate, momentum, Net::Plan::WEIGHT_DECAY}, shared);
    marks.mark(Net::UPDATE);
    if (__syncthreads_or(patience.given_up)) return give_up(step);
    marks.mark(Net::WAIT_AGAIN);
  }
}

#ifdef __CUDACC__
// Whole steps: both phases, each followed by a barrier of the grid.
template <class Net>
__device__ __forceinline__ void train(Step& step, float* shared, float* velocity, const float* learning_rates,
                                      float momentum, int steps, unsigned* arrived, unsigned* failed) {
  Block<Net> block(step, shared, steps);
  unsigned wanted = 0;
  for (int s = 0; s < steps; s++, step.order += step.count, step.number++) {
    const float learning_rate = learning_rates[s];  // asked for long before it is needed
    forward_backward<Net>(step, TRAIN, shared, block, NoTimer());
    if (!wait_for_grid(arrived, failed, wanted += gridDim.x)) return give_up(step);
    update<Net>(step, {step.parameters, velocity, nullptr, learning_rate, momentum, Net::Plan::WEIGHT_DECAY}, shared);
    if (!wait_for_grid(arrived, failed, wanted += gridDim.x)) return give_up(step);
  }
}
#endif

}  // namespace tuned

// The kernels of a network. All have blocks of Net::Threads::BLOCK threads, with Net::Plan::SHARED_BYTES of shared
// memory.
#define TUNED_STEP_PARAMETERS                                                                                   \
  const unsigned char *images, const unsigned char *labels, const int *order, float *parameters, float *traces, \
      float *partials, float *outputs, float *losses, float *stash, float mean, float deviation,                \
      const float *channels, int seed_low, int seed_high, int number, int count
#define TUNED_STEP_ARGUMENTS                                                                                          \
  images, labels, order, parameters, traces, partials, outputs, losses, stash, {mean, deviation, channels}, seed_low, \
      seed_high, number, count
#define TUNED_KERNEL(Net, name) ENTRY_POINT_BOUNDED(step, name, Net::Threads::BLOCK)
#define TUNED_SHARED(Net)                                      \
  SHARED_LARGE(Float4, float4s, Net::Plan::SHARED_BYTES / 16); \
  float* shared = reinterpret_cast<float*>(float4s)

// step_forward_backward: the first phase as a launch of its own, for a device without barriers of the grid and for all
//   that is no training. mode: one of tuned::Mode.
// step_time_sections: the first phase of a training step, timed: spent (sections,) is added to, in ticks of the first
//   block.
// step_update: the second phase. apply: whether the weights change; where they do not, the gradient is written.
// step_shuffle_images, step_draw_tables: shuffle.cuh.
#define TUNED_PHASES(Net)                                                                                         \
  TUNED_KERNEL(Net, forward_backward)(TUNED_STEP_PARAMETERS, int mode) {                                          \
    TUNED_SHARED(Net);                                                                                            \
    const tuned::Step step = {TUNED_STEP_ARGUMENTS};                                                              \
    tuned::Block<Net> block(step, shared, 1);                                                                     \
    tuned::forward_backward<Net>(step, mode, shared, block, tuned::NoTimer());                                    \
  }                                                                                                               \
  TUNED_KERNEL(Net, time_sections)(TUNED_STEP_PARAMETERS, unsigned long long* spent) {                            \
    TUNED_SHARED(Net);                                                                                            \
    const tuned::Step step = {TUNED_STEP_ARGUMENTS};                                                              \
    tuned::Block<Net> block(step, shared, 1);                                                                     \
    tuned::forward_backward<Net>(step, tuned::TRAIN, shared, block, tuned::SectionTimer{spent, 0});               \
  }                                                                                                               \
  TUNED_KERNEL(Net, update)(float* parameters, float* traces, float* partials, float* velocity, float* gradient,  \
                            const float* learning_rate, float momentum, int apply, int count) {                   \
    TUNED_SHARED(Net);                                                                                            \
    tuned::Step step = {};                                                                                        \
    step.traces = traces, step.partials = partials, step.count = count;                                           \
    const tuned::Update how = {parameters,     velocity, apply ? nullptr : gradient,                              \
                               *learning_rate, momentum, Net::Plan::WEIGHT_DECAY};                                \
    tuned::update<Net>(step, how, shared);                                                                        \
  }                                                                                                               \
  ENTRY_POINT(step, shuffle_images)(const unsigned short* __restrict__ tables, int* __restrict__ order, int half, \
                                    int count) {                                                                  \
    shuffle_images<Net::Plan::SHUFFLE_ROUNDS>(tables, order, half, count);                                        \
  }                                                                                                               \
  ENTRY_POINT(step, draw_tables)(unsigned short* __restrict__ tables, int half, int a, int b, int c, int d) {     \
    const unsigned entropy[4] = {static_cast<unsigned>(a), static_cast<unsigned>(b), static_cast<unsigned>(c),    \
                                 static_cast<unsigned>(d)};                                                       \
    draw_tables<Net::Plan::SHUFFLE_ROUNDS>(tables, half, entropy);                                                \
  }

// step_train where no barrier of the grid stands between the phases; for a batch of at most as many images as blocks.
//   handed (count TRACE + count PARTIALS + PARTIALS,): numbers whose stamps are none of stamp, stamp + 1, ...
//   `dense_tiles` and `failed` begin as 0, and `failed` ends as 1 when a block waited in vain.
#define TUNED_STAMPED_ENTRY_POINTS(Net)                                                                         \
  TUNED_PHASES(Net)                                                                                             \
  TUNED_KERNEL(Net, train)(TUNED_STEP_PARAMETERS, float* velocity, const float* learning_rates, float momentum, \
                           int steps, unsigned* dense_tiles, unsigned* failed, unsigned long long* handed,      \
                           int stamp) {                                                                         \
    TUNED_SHARED(Net);                                                                                          \
    tuned::Step step = {TUNED_STEP_ARGUMENTS};                                                                  \
    tuned::train_stamped<Net>(step, shared, velocity, learning_rates, momentum, steps,                          \
                              tuned::Handed::within<Net::Plan>(handed, count, dense_tiles, failed),             \
                              static_cast<unsigned>(stamp), tuned::NoTimer());                                  \
  }

// step_train: `steps` whole steps in one launch. order (steps, count), learning_rates (steps,). All blocks must be
// resident;
//   `arrived` and `failed` begin as 0, and `failed` ends as 1 when they were not.
#ifdef __CUDACC__
#define TUNED_ENTRY_POINTS(Net)                                                                                 \
  TUNED_PHASES(Net)                                                                                             \
  TUNED_KERNEL(Net, train)(TUNED_STEP_PARAMETERS, float* velocity, const float* learning_rates, float momentum, \
                           int steps, unsigned* arrived, unsigned* failed) {                                    \
    TUNED_SHARED(Net);                                                                                          \
    tuned::Step step = {TUNED_STEP_ARGUMENTS};                                                                  \
    tuned::train<Net>(step, shared, velocity, learning_rates, momentum, steps, arrived, failed);                \
  }
#else
#define TUNED_ENTRY_POINTS(Net) TUNED_PHASES(Net)
#endif
