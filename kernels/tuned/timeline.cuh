// Stage tuned: when every block of a launch is in which section of a step, by a clock that each block reads itself.
//
// This is a translation unit of its own (`BlockPlan.source(timeline=True)`): the kernels that train and are timed know
// nothing of it. A block's first thread leaves a mark when a section ends; reading the clock and storing the mark take
// some tens of nanoseconds, so that sections look a little longer than they are.
#pragma once
#include "step.cuh"

namespace tuned {

// Nanoseconds of a clock that all multiprocessors share. It is coarser than ticks(), and says how long a tick is.
__device__ __forceinline__ unsigned long long shared_clock() {
#ifdef __CUDACC__
  return nanoseconds();
#else
  return ticks();
#endif
}

// The marks of one block in device memory: how many there are, the shared clock when the first step and when the last
// one began, then (section, ticks) for each mark. What does not fit is counted and not kept. section + 1 is stored, so
// that 0 says that a step begins.
struct BlockMarks {
  static constexpr int BEGIN = -1, HEAD = 3;
  unsigned long long* at;
  int room;

  static __device__ __forceinline__ BlockMarks of(unsigned long long* marks, int room) {
    return {marks + static_cast<long long>(blockIdx.x) * (HEAD + 2 * room), room};
  }
  __device__ __forceinline__ void mark(int section) {
    if (threadIdx.x) return;
    const unsigned long long count = at[0]++;
    if (count >= static_cast<unsigned long long>(room)) return;
    at[HEAD + 2 * count] = section + 1;
    at[HEAD + 2 * count + 1] = ticks();
    if (section != BEGIN) return;
    at[2] = shared_clock();
    if (count == 0) at[1] = at[2];
  }
};

#ifdef __CUDACC__
// As tuned::train, with a mark at the end of each section of each step.
template <class Net>
__device__ __forceinline__ void train_marked(Step& step, float* shared, float* velocity, const float* learning_rates,
                                             float momentum, int steps, unsigned* arrived, unsigned* failed,
                                             BlockMarks marks) {
  Block<Net> block(step, shared, steps);
  unsigned wanted = 0;
  for (int s = 0; s < steps; s++, step.order += step.count, step.number++) {
    const float learning_rate = learning_rates[s];
    marks.mark(BlockMarks::BEGIN);
    forward_backward<Net>(step, TRAIN, shared, block, marks);
    if (!wait_for_grid(arrived, failed, wanted += gridDim.x)) return;
    marks.mark(Net::WAIT);
    update<Net>(step, {step.parameters, velocity, nullptr, learning_rate, momentum, Net::Plan::WEIGHT_DECAY}, shared);
    marks.mark(Net::UPDATE);
    if (!wait_for_grid(arrived, failed, wanted += gridDim.x)) return;
    marks.mark(Net::WAIT_AGAIN);
  }
}
#endif

}  // namespace tuned

// step_mark_forward_backward, step_mark_update: the phases as launches of their own, for a device without barriers of
//   the grid. marks (grid, 3 + 2 room).
#define TUNED_MARKED_PHASES(Net)                                                                                   \
  TUNED_KERNEL(Net, mark_forward_backward)(TUNED_STEP_PARAMETERS, unsigned long long* marks, int room) {           \
    TUNED_SHARED(Net);                                                                                             \
    const tuned::Step step = {TUNED_STEP_ARGUMENTS};                                                               \
    tuned::Block<Net> block(step, shared, 1);                                                                      \
    tuned::BlockMarks own = tuned::BlockMarks::of(marks, room);                                                    \
    own.mark(tuned::BlockMarks::BEGIN);                                                                            \
    tuned::forward_backward<Net>(step, tuned::TRAIN, shared, block, own);                                          \
  }                                                                                                                \
  TUNED_KERNEL(Net, mark_update)(float* parameters, float* traces, float* partials, float* velocity,               \
                                 const float* learning_rate, float momentum, int count, unsigned long long* marks, \
                                 int room) {                                                                       \
    TUNED_SHARED(Net);                                                                                             \
    tuned::Step step = {};                                                                                         \
    step.traces = traces, step.partials = partials, step.count = count;                                            \
    tuned::BlockMarks own = tuned::BlockMarks::of(marks, room);                                                    \
    own.mark(Net::WAIT);                                                                                           \
    tuned::update<Net>(step, {parameters, velocity, nullptr, *learning_rate, momentum, Net::Plan::WEIGHT_DECAY},   \
                       shared);                                                                                    \
    own.mark(Net::UPDATE);                                                                                         \
  }

// step_mark_train: whole steps in one launch, as step_train.
#ifdef __CUDACC__
#define TUNED_TIMELINE_ENTRY_POINTS(Net)                                                                               \
  TUNED_MARKED_PHASES(Net)                                                                                             \
  TUNED_KERNEL(Net, mark_train)(TUNED_STEP_PARAMETERS, float* velocity, const float* learning_rates, float momentum,   \
                                int steps, unsigned* arrived, unsigned* failed, unsigned long long* marks, int room) { \
    TUNED_SHARED(Net);                                                                                                 \
    tuned::Step step = {TUNED_STEP_ARGUMENTS};                                                                         \
    tuned::train_marked<Net>(step, shared, velocity, learning_rates, momentum, steps, arrived, failed,                 \
                             tuned::BlockMarks::of(marks, room));                                                      \
  }
#else
#define TUNED_TIMELINE_ENTRY_POINTS(Net) TUNED_MARKED_PHASES(Net)
#endif

// step_mark_train of blocks that hand each other stamped numbers.
#define TUNED_STAMPED_TIMELINE_ENTRY_POINTS(Net)                                                                     \
  TUNED_MARKED_PHASES(Net)                                                                                           \
  TUNED_KERNEL(Net, mark_train)(TUNED_STEP_PARAMETERS, float* velocity, const float* learning_rates, float momentum, \
                                int steps, unsigned* dense_tiles, unsigned* failed, unsigned long long* marks,       \
                                int room, unsigned long long* handed, int stamp) {                                   \
    TUNED_SHARED(Net);                                                                                               \
    tuned::Step step = {TUNED_STEP_ARGUMENTS};                                                                       \
    tuned::train_stamped<Net>(step, shared, velocity, learning_rates, momentum, steps,                               \
                              tuned::Handed::within<Net::Plan>(handed, count, dense_tiles, failed),                  \
                              static_cast<unsigned>(stamp), tuned::BlockMarks::of(marks, room));                     \
  }
