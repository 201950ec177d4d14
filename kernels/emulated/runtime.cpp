// Runs the blocks of a launch: a fiber for each CUDA thread that has to wait, blocks spread over OS threads.
//
// A block's threads run one after another on one fiber, as a plain loop, for as long as none waits. A thread
// that waits keeps its fiber and the loop continues on another one; so a kernel without barriers never
// switches. Within a block the order is fixed (ascending, or descending with `reverse`), so a block gives
// the same bits on every run, and two orders that differ betray a missing barrier.
#include <pthread.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "threads.hpp"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

#if defined(__SANITIZE_ADDRESS__)
#define EMULATED_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATED_ASAN 1
#endif
#endif
#ifndef EMULATED_ASAN
#define EMULATED_ASAN 0
#endif

// What kernels read and write is watched: see watch.hpp.
#ifndef EMULATED_WATCH
#define EMULATED_WATCH 0
#endif

#if EMULATED_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Without assembly for this processor, or by -DEMULATED_UCONTEXT=1, stacks are switched by the C library.
#ifndef EMULATED_UCONTEXT
#if defined(__x86_64__) || defined(__aarch64__)
#define EMULATED_UCONTEXT 0
#else
#define EMULATED_UCONTEXT 1
#endif
#endif
#if EMULATED_UCONTEXT
#include <ucontext.h>
#endif

extern "C" {
EMULATED_THREAD_LOCAL EmulatedContext emulated_context = {};
}

namespace {

constexpr int MAX_THREADS = 1024;  // per block, CUDA's limit
constexpr int WARP = 32;
constexpr int MAX_WARPS = MAX_THREADS / WARP;
constexpr size_t SHARED_LIMIT = 48 * 1024;  // CUDA's limit for arrays of fixed size
constexpr size_t LARGE_LIMIT = 227 * 1024;  // with SHARED_LARGE: what a block of an H100 may have
constexpr size_t STACK = (EMULATED_ASAN ? 512 : 128) * 1024;
constexpr size_t PAGE = 4096;
constexpr size_t RED_ZONE = EMULATED_WATCH ? 4096 : EMULATED_ASAN ? 64 : 0;  // between SHARED arrays
constexpr int GUARDED_FIBERS = 16384;  // a guard page each would use up the kernel's limit of mappings
constexpr int MAX_SHARED_ARRAYS = 64;

// ---- switching stacks -----------------------------------------------------------------------------------

// CAREFUL: a switch must know both fibers, as for AddressSanitizer. Otherwise a stack pointer is enough.
#define EMULATED_CAREFUL (EMULATED_ASAN || EMULATED_UCONTEXT)

#if !EMULATED_UCONTEXT
// Saves the registers that a C function must preserve, and nothing else. It returns with an ordinary `ret`:
// successive fibers are mostly suspended at the same call, so that the processor predicts it correctly.
extern "C" __attribute__((visibility("hidden"))) void emulated_switch_stacks(void** save, void* load);

#if defined(__APPLE__)
#define ASM_NAME "_emulated_switch_stacks"
#else
#define ASM_NAME "emulated_switch_stacks"
#endif

#if defined(__x86_64__)
constexpr int SAVED_WORDS = 6;
asm(".text\n.p2align 4\n.globl " ASM_NAME "\n" ASM_NAME
    ":\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n");
#else  // aarch64: x19-x30, d8-d15
constexpr int SAVED_WORDS = 20;
asm(".text\n.p2align 4\n.globl " ASM_NAME "\n" ASM_NAME
    ":\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp, #0]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n"
    "  stp x25, x26, [sp, #48]\n  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n  stp d12, d13, [sp, #128]\n"
    "  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n  str x9, [x0]\n  mov sp, x1\n"
    "  ldp x19, x20, [sp, #0]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n"
    "  ldp x25, x26, [sp, #48]\n  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n  ldp d12, d13, [sp, #128]\n"
    "  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n  ret\n");
#endif
#endif

struct Fiber;
#if EMULATED_CAREFUL
using Suspended = Fiber*;
#else
using Suspended = void*;  // a suspended stack pointer
#endif

struct Fiber {
  Suspended suspended;  // where the fiber resumes, while it is free
  Fiber* next_free;
  char* stack;     // lowest usable byte
  size_t stagger;  // so that the tops of stacks do not all fall on the same cache lines
#if EMULATED_ASAN
  void* fake_stack;
#endif
#if EMULATED_UCONTEXT
  ucontext_t state;
#elif EMULATED_CAREFUL
  void* stack_pointer;
#endif
};

struct Worker;
EMULATED_THREAD_LOCAL Worker* this_worker = nullptr;
#if EMULATED_WATCH
void forget_shared_accesses();  // when another block begins
#endif
std::atomic<int> fibers_made{0};

void fiber_main();

void prepare(Fiber& fiber) {
  char* top = fiber.stack + STACK - fiber.stagger;
#if EMULATED_ASAN
  // An abandoned kernel may have left parts of the stack poisoned.
  __asan_unpoison_memory_region(fiber.stack, STACK);
#endif
#if EMULATED_ASAN
  fiber.fake_stack = nullptr;
#endif
#if EMULATED_UCONTEXT
  getcontext(&fiber.state);
  fiber.state.uc_stack.ss_sp = fiber.stack;
  fiber.state.uc_stack.ss_size = static_cast<size_t>(top - fiber.stack);
  fiber.state.uc_link = nullptr;
  makecontext(&fiber.state, fiber_main, 0);
#else
  void** words = reinterpret_cast<void**>(top);
#if defined(__x86_64__)
  *--words = nullptr;  // fiber_main is entered as if called: the stack 8 off a multiple of 16
  *--words = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < SAVED_WORDS; ++i) *--words = nullptr;
#else
  words -= SAVED_WORDS;
  for (int i = 0; i < SAVED_WORDS; ++i) words[i] = nullptr;
  words[11] = reinterpret_cast<void*>(fiber_main);  // x30
#endif
#if EMULATED_CAREFUL
  fiber.stack_pointer = words;
#else
  fiber.suspended = words;
#endif
#endif
#if EMULATED_CAREFUL
  fiber.suspended = &fiber;
#endif
}

// ---- one block ------------------------------------------------------------------------------------------

struct Warp {
  uint32_t ready;  // lanes that can run (or run); all others have ended or wait
  uint32_t ended;
  uint32_t open;  // meetings that have begun
};

// Lanes that meet at a warp operation.
struct Meeting {
  uint32_t mask, arrived, ballot;
  const EmulatedSite* site;
};

struct SharedArray {
  const void* site;
  char* at;
  size_t bytes;
  bool large;
  const char* name;
};

struct Launch {
  const EmulatedLaunch* wanted;
  uint64_t blocks;
  uint64_t chunk;
  std::atomic<uint64_t> next{0};
  std::atomic<bool> failed{false};
  std::atomic<uint64_t> waits{0};  // of threads for the kernel before
  std::mutex message_lock;
};

struct Worker {
  // the block that runs
  void (*body)(const void*);
  const void* arguments;
  Launch* launch = nullptr;  // while blocks run
  int threads, warps;
  int alive;    // threads that have not ended
  int arrived;  // at the block's barrier
  int votes, result;
  uint64_t waits = 0;  // of threads for the kernel before, not yet counted in the launch
  bool reverse, abandoned;
  const EmulatedSite* site;           // of the barrier, while arrived > 0
  unsigned barriers_passed;           // by the block
  uint32_t last_warp;                 // its lanes that exist
  unsigned warp_meetings[MAX_WARPS];  // that have ended
  Warp warp[MAX_WARPS];
  EmulatedIndex index[MAX_THREADS];       // threadIdx of each thread
  EmulatedIndex index_of{0, 0, 0};        // the blockDim it was made for
  Suspended suspended[MAX_THREADS] = {};  // where a suspended thread resumes; null for all others
  uint64_t value[MAX_THREADS];            // a thread's operand of a warp operation, and then its result
  int source[MAX_THREADS];
  Meeting meeting[MAX_THREADS] = {};  // 32 for each warp; mostly the mask's lowest lane has the one in use

  // shared memory
  char* arena;
  size_t arena_used = 0;
  int arrays = 0, hint = 0;
  SharedArray array[MAX_SHARED_ARRAYS];

  // fibers
  Suspended home_suspended;  // on the OS thread's own stack
#if EMULATED_CAREFUL
  Fiber home{};
  Fiber* running = &home;
#endif
  Fiber* taken = nullptr;  // last
  Fiber* free_fibers = nullptr;
  std::vector<Fiber*> all_fibers;
  const void* home_bottom = nullptr;
  size_t home_size = 0;

  Worker() {
    arena = static_cast<char*>(aligned_alloc(4096, arena_bytes()));
    if (!arena) abort();
  }
  Worker(const Worker&) = delete;
  ~Worker() {
#if EMULATED_ASAN
    // The next owner of this memory must be able to use it.
    __asan_unpoison_memory_region(arena, arena_bytes());
    for (Fiber* fiber : all_fibers) __asan_unpoison_memory_region(fiber->stack, STACK);
#endif
    for (Fiber* fiber : all_fibers) {
      munmap(fiber->stack - PAGE, STACK + PAGE);
      delete fiber;
      --fibers_made;
    }
    free(arena);
  }
  static constexpr size_t arena_bytes() {
    return (LARGE_LIMIT + 4096 + (MAX_SHARED_ARRAYS + 1) * RED_ZONE + 4095) / 4096 * 4096;
  }

  // ---- order of threads
  static int first_lane(uint32_t lanes) { return __builtin_ctz(lanes); }
  static int last_lane(uint32_t lanes) { return 31 - __builtin_clz(lanes); }
  int pick(uint32_t lanes) const { return reverse ? last_lane(lanes) : first_lane(lanes); }

  // The next thread after `thread` that can run, in order and around; -1 if none can.
  int after(int thread) const {
    const int w = thread / WARP, lane = thread % WARP;
    if (!reverse) {
      const uint32_t rest = warp[w].ready & (~0u << lane) & ~(1u << lane);
      if (rest) return w * WARP + first_lane(rest);
      for (int i = w + 1; i < warps; ++i)
        if (warp[i].ready) return i * WARP + first_lane(warp[i].ready);
      for (int i = 0; i <= w; ++i)
        if (warp[i].ready) return i * WARP + first_lane(warp[i].ready);
    } else {
      const uint32_t rest = warp[w].ready & ((1u << lane) - 1);
      if (rest) return w * WARP + last_lane(rest);
      for (int i = w - 1; i >= 0; --i)
        if (warp[i].ready) return i * WARP + last_lane(warp[i].ready);
      for (int i = warps - 1; i >= w; --i)
        if (warp[i].ready) return i * WARP + last_lane(warp[i].ready);
    }
    return -1;
  }

  uint32_t lanes_of(int w) const { return w == warps - 1 ? last_warp : ~0u; }

  // The thread that runs is emulated_context.thread.
  void enter(int thread) {
    emulated_context.thread = thread;
    emulated_context.threadIdx = index[thread];
  }

  // ---- fibers
  Fiber* take_fiber() {
    if (Fiber* fiber = free_fibers) {
      free_fibers = fiber->next_free;
      return taken = fiber;
    }
    const int number = fibers_made++;
    char* memory =
        static_cast<char*>(mmap(nullptr, STACK + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory == MAP_FAILED) {
      fprintf(stderr, "emulated device: no memory for the stacks of a block's threads\n");
      abort();
    }
    if (number < GUARDED_FIBERS) mprotect(memory, PAGE, PROT_NONE);
#ifdef MADV_NOHUGEPAGE
    madvise(memory, STACK + PAGE, MADV_NOHUGEPAGE);  // each stack uses a page or two
#endif
    Fiber* fiber = new Fiber{};
    fiber->stack = memory + PAGE;
    fiber->stagger = static_cast<size_t>(number) * 192 % 4096;
    prepare(*fiber);
    all_fibers.push_back(fiber);
    return taken = fiber;
  }
  void give_fiber(Fiber* fiber) {
    fiber->next_free = free_fibers;
    free_fibers = fiber;
  }

  // Leaves the running stack, which resumes when another one jumps to `from`, and resumes `to`.
  void jump(Suspended& from, Suspended to) {
#if EMULATED_CAREFUL
    Fiber* const self = from = running;
    running = to;
#if EMULATED_ASAN
    const bool homeward = to == &home;
    __sanitizer_start_switch_fiber(&self->fake_stack, homeward ? home_bottom : to->stack, homeward ? home_size : STACK);
#endif
#if EMULATED_UCONTEXT
    swapcontext(&self->state, &to->state);
#else
    emulated_switch_stacks(&self->stack_pointer, to->stack_pointer);
#endif
#if EMULATED_ASAN
    __sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);
#endif
#else
    emulated_switch_stacks(&from, to);
#endif
  }

  // Switches from the running thread, which waits, to `thread`.
  void switch_to(int thread) {
    Suspended& from = suspended[emulated_context.thread];
    const Suspended to = suspended[thread] ? suspended[thread] : take_fiber()->suspended;
    enter(thread);
    jump(from, to);
  }

  // ---- failing
  __attribute__((format(printf, 2, 3))) void report(const char* format, ...) {
    std::lock_guard<std::mutex> guard(launch->message_lock);
    if (launch->failed) return;
    char detail[384];
    va_list list;
    va_start(list, format);
    vsnprintf(detail, sizeof detail, format, list);
    va_end(list);
    const EmulatedIndex& b = emulated_context.blockIdx;
    snprintf(launch->wanted->message, EMULATED_MESSAGE_BYTES, "kernel %s, block (%u,%u,%u): %s", launch->wanted->kernel,
             b.x, b.y, b.z, detail);
    launch->failed = true;
  }

  // Leaves the block as it is; never returns.
  [[noreturn]] void abandon() {
    abandoned = true;
    Suspended nowhere;
    jump(nowhere, home_suspended);
    abort();
  }

  [[noreturn]] void stuck() {
    int ended = 0, in_warp = 0;
    const Meeting* open = nullptr;
    int open_warp = 0;
    for (int w = 0; w < warps; ++w) {
      ended += __builtin_popcount(warp[w].ended);
      for (int lane = 0; lane < WARP; ++lane) {
        const Meeting& m = meeting[w * WARP + lane];
        if (!m.arrived) continue;
        in_warp += __builtin_popcount(m.arrived);
        if (!open) open = &m, open_warp = w;
      }
    }
    char barrier[160] = "";
    if (arrived)
      snprintf(barrier, sizeof barrier, " %d wait at the barrier %s:%d,", arrived, base(site->file), site->line);
    if (open) {
      report(
          "warp operation at %s:%d waits for lanes that do not come: warp %d, mask %08x, come %08x "
          "(of %d threads %d wait for their warp,%s %d have ended)",
          base(open->site->file), open->site->line, open_warp, open->mask, open->arrived, threads, in_warp, barrier,
          ended);
    } else {
      report("divergent barrier: of %d threads%s %d have ended", threads, barrier, ended);
    }
    abandon();
  }

  static const char* base(const char* path) {
    const char* slash = path ? strrchr(path, '/') : nullptr;
    return slash ? slash + 1 : path ? path : "?";
  }

  // Suspends the running thread until another one makes it ready.
  void wait() {
    const int me = emulated_context.thread;
    warp[me / WARP].ready &= ~(1u << (me % WARP));
    const int next = after(me);
    if (next < 0) stuck();
    switch_to(next);
  }

  // ---- a block from beginning to end
  void run_block(uint64_t number) {
    const EmulatedIndex& grid = emulated_context.gridDim;
    emulated_context.blockIdx = {static_cast<unsigned>(number % grid.x),
                                 static_cast<unsigned>(number / grid.x % grid.y),
                                 static_cast<unsigned>(number / grid.x / grid.y)};
    for (int w = 0; w < warps; ++w) warp[w] = {~0u, 0, 0};
    warp[warps - 1].ready = last_warp;
    alive = threads;
    arrived = votes = 0;
    barriers_passed = 0;
    memset(warp_meetings, 0, sizeof warp_meetings);
    hint = 0;
    poison_arrays();
#if EMULATED_WATCH
    forget_shared_accesses();
#endif
    abandoned = false;
    const Suspended first = take_fiber()->suspended;
    enter(reverse ? threads - 1 : 0);
    jump(home_suspended, first);
    if (abandoned) {
      free_fibers = nullptr;
      for (Fiber* each : all_fibers) {
        prepare(*each);
        give_fiber(each);
      }
      for (Meeting& m : meeting) m.arrived = 0;
      for (Suspended& p : suspended) p = nullptr;
    }
  }

  void start(Launch& with) {
    launch = &with;
    const EmulatedLaunch& wanted = *with.wanted;
    body = wanted.body;
    arguments = wanted.arguments;
    reverse = wanted.reverse != 0;
    emulated_context.gridDim = wanted.grid;
    emulated_context.blockDim = wanted.block;
    const EmulatedIndex& b = wanted.block;
    threads = static_cast<int>(b.x * b.y * b.z);
    warps = (threads + WARP - 1) / WARP;
    last_warp = threads % WARP ? (1u << (threads % WARP)) - 1 : ~0u;
    if (memcmp(&index_of, &b, sizeof b) != 0) {
      index_of = b;
      int t = 0;
      for (unsigned z = 0; z < b.z; ++z)
        for (unsigned y = 0; y < b.y; ++y)
          for (unsigned x = 0; x < b.x; ++x) index[t++] = {x, y, z};
    }
    arrays = 0;
    arena_used = 0;
#if EMULATED_ASAN
    __asan_poison_memory_region(arena, arena_bytes());
#endif
    this_worker = this;
    emulated_context.values = value;
#if EMULATED_CAREFUL
    home_suspended = &home;
#endif
  }

  void run(Launch& with) {
    bool started = false;
    while (!with.failed.load(std::memory_order_relaxed)) {
      const uint64_t from = with.next.fetch_add(with.chunk, std::memory_order_relaxed);
      if (from >= with.blocks) break;
      if (!started) start(with), started = true;
      const uint64_t to = from + with.chunk < with.blocks ? from + with.chunk : with.blocks;
      for (uint64_t i = from; i < to && !with.failed.load(std::memory_order_relaxed); ++i)
        run_block(reverse ? with.blocks - 1 - i : i);
    }
    if (waits) with.waits += waits, waits = 0;
    launch = nullptr;
  }

  // ---- shared memory
  void poison_arrays() {
    for (int i = 0; i < arrays; ++i) memset(array[i].at, 0xFF, array[i].bytes);
  }

  void* shared(const void* site, size_t bytes, size_t alignment, bool large, const char* name) {
    // Threads mostly declare their arrays in the same order as the first thread.
    if (hint < arrays && array[hint].site == site) return array[hint++].at;
    for (int i = 0; i < arrays; ++i)
      if (array[i].site == site) {
        hint = i + 1;
        return array[i].at;
      }
    size_t fixed = large ? 0 : bytes, all = bytes;
    for (int i = 0; i < arrays; ++i) {
      if (!array[i].large) fixed += array[i].bytes;
      all += array[i].bytes;
    }
    if (large && bytes > launch->wanted->shared_bytes) {
      report("SHARED_LARGE array %s of %zu bytes: the launch named %zu", name, bytes, launch->wanted->shared_bytes);
      abandon();
    }
    if (fixed > SHARED_LIMIT || all > LARGE_LIMIT || arrays == MAX_SHARED_ARRAYS) {
      report("shared array %s of %zu bytes beside %zu others: a block has %zu", name, bytes, all - bytes,
             fixed > SHARED_LIMIT ? SHARED_LIMIT : LARGE_LIMIT);
      abandon();
    }
    const size_t step = alignment < 16 ? 16 : alignment;
    size_t at = arena_used + RED_ZONE;
    at = (at + step - 1) / step * step;
    if (at + bytes > arena_bytes()) {
      report("shared array %s does not fit beside %d others", name, arrays);
      abandon();
    }
    arena_used = at + bytes;
#if EMULATED_ASAN
    __asan_unpoison_memory_region(arena + at, bytes);
#endif
    memset(arena + at, 0xFF, bytes);
    array[arrays] = {site, arena + at, bytes, large, name};
    hint = ++arrays;
    return arena + at;
  }

  // ---- waiting
  int barrier(int predicate, const EmulatedSite* at) {
    if (arrived == 0) {
      site = at;
    } else if (site != at) {
      const bool one_line = site->line == at->line && strcmp(site->file, at->file) == 0;
      report("divergent barrier: of %d threads %d wait at %s:%d and one comes to %s:%d%s", threads, arrived,
             base(site->file), site->line, base(at->file), at->line,
             one_line ? " of another instance of the template" : "");
      abandon();
    }
    votes += predicate;
    if (++arrived < threads) {
      wait();
      return result;
    }
    result = votes;
    arrived = votes = 0;
    ++barriers_passed;
    for (int w = 0; w < warps; ++w) warp[w].ready = lanes_of(w);
    const int next = reverse ? threads - 1 : 0;
    if (next != emulated_context.thread) switch_to(next);
    return result;
  }

  // Lanes that have left a meeting of a part of the warp may already be at another one, such as of all lanes.
  Meeting& find_meeting(int w, uint32_t mask, const EmulatedSite* at) {
    Meeting* const mine = meeting + w * WARP;
    uint32_t& open = warp[w].open;
    for (uint32_t slots = open; slots; slots &= slots - 1) {
      Meeting& m = mine[first_lane(slots)];
      if (m.mask == mask && m.site == at) return m;
    }
    const uint32_t home = mask & (0u - mask);
    const int slot = first_lane(open & home ? ~open : home);
    open |= 1u << slot;
    mine[slot] = {mask, 0, 0, at};
    return mine[slot];
  }

  // The running thread arrives at a meeting. If it is the last, it must `release` the others, or else wait.
  Meeting& come(unsigned wanted, const EmulatedSite* at, bool& complete) {
    const int me = emulated_context.thread, w = me / WARP;
    const uint32_t bit = 1u << (me % WARP);
    const uint32_t mask = wanted & lanes_of(w);  // lanes beyond the block do not exist
    if (!(mask & bit)) {
      report("warp operation at %s:%d: lane %d is not in its own mask %08x", base(at->file), at->line, me % WARP,
             wanted);
      abandon();
    }
    Meeting& m = find_meeting(w, mask, at);
    m.arrived |= bit;
    complete = m.arrived == m.mask;
    return m;
  }

  void release(Meeting& m) {
    const int me = emulated_context.thread, w = me / WARP;
    m.arrived = 0;
    ++warp_meetings[w];
    warp[w].open &= ~(1u << (&m - (meeting + w * WARP)));
    warp[w].ready |= m.mask;
    const int next = w * WARP + pick(m.mask);
    if (next != me) switch_to(next);
  }

  void exchange(unsigned mask, int lane, uint64_t brought, const EmulatedSite* at) {
    const int me = emulated_context.thread;
    bool complete;
    Meeting& m = come(mask, at, complete);
    value[me] = brought;
    source[me] = lane;
    if (complete) {
      const int base_thread = me / WARP * WARP;
      uint64_t values[WARP];
      memcpy(values, value + base_thread, sizeof values);
      for (uint32_t lanes = m.mask; lanes; lanes &= lanes - 1) {
        const int l = first_lane(lanes);
        const int from = source[base_thread + l] & 31;
        value[base_thread + l] = m.mask >> from & 1 ? values[from] : ~uint64_t{0};
      }
      release(m);
    } else {
      wait();
    }
  }

  void ballot(unsigned mask, int predicate, const EmulatedSite* at) {
    const int me = emulated_context.thread;
    bool complete;
    Meeting& m = come(mask, at, complete);
    if (predicate) m.ballot |= 1u << (me % WARP);
    if (complete) {
      for (uint32_t lanes = m.mask; lanes; lanes &= lanes - 1) value[me / WARP * WARP + first_lane(lanes)] = m.ballot;
      release(m);
    } else {
      wait();
    }
  }
};

// A fiber runs, from the first to the last, the threads that are not suspended.
void fiber_main() {
  Worker& w = *this_worker;
  Fiber* self = w.taken;
#if EMULATED_ASAN
  {
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    if (!w.home_size) w.home_bottom = bottom, w.home_size = size;
  }
#endif
  for (;;) {
    Suspended to;
    for (;;) {
      w.hint = 0;
      w.body(w.arguments);
      const int ended = emulated_context.thread;
      Warp& mine = w.warp[ended / WARP];
      const uint32_t bit = 1u << (ended % WARP);
      mine.ready &= ~bit;
      mine.ended |= bit;
      w.suspended[ended] = nullptr;
      if (--w.alive == 0) {
        to = w.home_suspended;
        break;
      }
      const int next = w.after(ended);
      if (next < 0) w.stuck();
      w.enter(next);
      if ((to = w.suspended[next])) break;
    }
    w.give_fiber(self);
    w.jump(self->suspended, to);
  }
}

// ---- OS threads -----------------------------------------------------------------------------------------

// Waking a sleeping OS thread takes longer than many launches do, so both sides poll for a while before they
// sleep: a helper for the next launch, the caller for the end of the helpers' last blocks.
template <typename Condition>
bool look_for(Condition condition) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(30);
  do {
    for (int i = 0; i < 16; ++i) {
      if (condition()) return true;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  } while (std::chrono::steady_clock::now() < until);
  return false;
}

struct Pool {
  std::mutex running;  // one launch at a time
  std::mutex lock;     // protects the members below; the atomic ones are also read without it
  std::condition_variable wake, done;
  Launch* open = nullptr;  // helpers may join it
  std::atomic<uint64_t> generation{0};
  std::atomic<int> inside{0};  // helpers at work on it
  int wanted = 0;              // helpers that may still join
  int helpers = 0;             // OS threads made
  int asleep = 0;

  void help() {
    Worker worker;
    uint64_t seen = 0;
    for (;;) {
      look_for([&] { return generation.load(std::memory_order_relaxed) != seen; });
      std::unique_lock<std::mutex> guard(lock);
      ++asleep;
      wake.wait(guard, [&] { return generation != seen; });
      --asleep;
      seen = generation;
      if (!open || wanted == 0) continue;
      --wanted;
      ++inside;
      Launch* launch = open;
      guard.unlock();
      worker.run(*launch);
      guard.lock();
      if (--inside == 0) done.notify_one();
    }
  }

  void run(Launch& launch, uint64_t workers) {
    std::lock_guard<std::mutex> one(running);
    const int others = static_cast<int>((workers < launch.blocks ? workers : launch.blocks) - 1);
    if (others > 0) {
      std::lock_guard<std::mutex> guard(lock);
      try {
        for (; helpers < others; ++helpers) std::thread([this] { help(); }).detach();
      } catch (const std::system_error&) {
        // No more threads can be made: the existing ones do the work.
      }
      open = &launch;
      wanted = others;
      ++generation;
      if (asleep) wake.notify_all();
    }
    // A worker stays with its OS thread: the compiler may keep the address of a thread-local variable
    // across a switch of stacks, so a fiber must not wander from one OS thread to another.
    static thread_local std::unique_ptr<Worker> caller;
    if (!caller) caller = std::make_unique<Worker>();
    caller->run(launch);
    if (others > 0) {
      std::unique_lock<std::mutex> guard(lock);
      open = nullptr;
      if (inside == 0) return;
      guard.unlock();
      look_for([&] { return inside.load(std::memory_order_relaxed) == 0; });
      guard.lock();
      done.wait(guard, [&] { return inside == 0; });
    }
  }
};

std::atomic<Pool*> the_pool{nullptr};

// After a fork the helpers are gone: the child makes a new pool and does not touch the old one.
void forget_pool() { the_pool = nullptr; }

Pool& pool() {
  Pool* found = the_pool;
  if (found) return *found;
  static std::mutex making;
  std::lock_guard<std::mutex> guard(making);
  if (!the_pool) {
    static bool registered = false;
    if (!registered) pthread_atfork(nullptr, nullptr, forget_pool), registered = true;
    the_pool = new Pool;  // never deleted: detached helpers wait on it until the process ends
  }
  return *the_pool;
}

}  // namespace

#if EMULATED_WATCH
#include "watch.hpp"
#endif

extern "C" {

void emulated_give_up(const char* why) {
  this_worker->report("%s", why);
  this_worker->abandon();
}

void* emulated_shared(const void* site, size_t bytes, size_t alignment, int large, const char* name) {
  return this_worker->shared(site, bytes, alignment, large != 0, name);
}
void emulated_wait_for_previous_kernel() { this_worker->waits++; }
int emulated_barrier_count(int predicate, const EmulatedSite* site) { return this_worker->barrier(predicate, site); }
void emulated_ballot(unsigned mask, int predicate, const EmulatedSite* site) {
  this_worker->ballot(mask, predicate, site);
}

// Out of line, so that the functions below have no registers to save.
static __attribute__((noinline)) void any_barrier(const EmulatedSite* site) { this_worker->barrier(0, site); }
static __attribute__((noinline)) void any_exchange(unsigned mask, int source, uint64_t value,
                                                   const EmulatedSite* site) {
  this_worker->exchange(mask, source, value, site);
}

#if EMULATED_CAREFUL
void emulated_barrier(const EmulatedSite* site) { any_barrier(site); }
void emulated_exchange(unsigned mask, int source, uint64_t value, const EmulatedSite* site) {
  any_exchange(mask, source, value, site);
}
#else
// The common case of a wait: a thread that is neither the first nor the last to arrive, and whose successor in
// the same warp has been here before. The switch is then a tail call: registers are saved once, by it.
static inline __attribute__((always_inline)) Suspended successor(Worker& w, int me, uint32_t& ready, int& next) {
  const uint32_t bit = 1u << (me % WARP);
  ready = w.warp[me / WARP].ready & ~bit;
  const uint32_t rest = w.reverse ? ready & (bit - 1) : ready & ~(bit - 1);
  if (!rest) return nullptr;
  next = (me & ~(WARP - 1)) + w.pick(rest);
  return w.suspended[next];
}

void emulated_barrier(const EmulatedSite* site) {
  Worker& w = *this_worker;
  const int me = emulated_context.thread;
  uint32_t ready;
  int next;
  const Suspended to = successor(w, me, ready, next);
  if (!to || !w.arrived || w.site != site || w.arrived + 1 >= w.threads) return any_barrier(site);
  w.arrived++;
  w.warp[me / WARP].ready = ready;
  w.enter(next);
  return emulated_switch_stacks(&w.suspended[me], to);
}

void emulated_exchange(unsigned mask, int source, uint64_t value, const EmulatedSite* site) {
  Worker& w = *this_worker;
  const int me = emulated_context.thread;
  Meeting& m = w.meeting[me & ~(WARP - 1)];
  const uint32_t arrived = m.arrived | 1u << (me % WARP);
  uint32_t ready;
  int next;
  const Suspended to = successor(w, me, ready, next);
  if (!to || !(mask & 1) || !(mask >> (me % WARP) & 1) || !m.arrived || m.mask != mask || m.site != site ||
      arrived == mask)
    return any_exchange(mask, source, value, site);
  w.value[me] = value;
  w.source[me] = source;
  m.arrived = arrived;
  w.warp[me / WARP].ready = ready;
  w.enter(next);
  return emulated_switch_stacks(&w.suspended[me], to);
}
#endif

int emulated_run(const EmulatedLaunch* wanted) {
  const EmulatedIndex &grid = wanted->grid, &block = wanted->block;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > MAX_THREADS || block.z > 64) {
    snprintf(wanted->message, EMULATED_MESSAGE_BYTES, "kernel %s: block (%u,%u,%u) is not 1 to %d threads",
             wanted->kernel, block.x, block.y, block.z, MAX_THREADS);
    return 1;
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    snprintf(wanted->message, EMULATED_MESSAGE_BYTES, "kernel %s: grid (%u,%u,%u) is not within (2^31-1,65535,65535)",
             wanted->kernel, grid.x, grid.y, grid.z);
    return 1;
  }
  Launch launch;
  launch.wanted = wanted;
  launch.blocks = uint64_t{grid.x} * grid.y * grid.z;
#if EMULATED_WATCH
  const uint64_t workers = 1;
  forget_accesses();
#else
  const uint64_t workers = wanted->workers > 0 ? static_cast<uint64_t>(wanted->workers) : 1;
#endif
  const uint64_t chunk = launch.blocks / (workers * 16);
  launch.chunk = chunk < 1 ? 1 : chunk > 64 ? 64 : chunk;
  pool().run(launch, workers);
  if (launch.failed) return 1;
  const uint64_t all = launch.blocks * threads, waits = launch.waits;
  if (wanted->programmatic && waits != all) {
    snprintf(
        wanted->message, EMULATED_MESSAGE_BYTES,
        "kernel %s: launched programmatically, so each of its %llu threads must wait once for the kernel before it; "
        "they waited %llu times",
        wanted->kernel, static_cast<unsigned long long>(all), static_cast<unsigned long long>(waits));
    return 1;
  }
  return 0;
}

// Memory of device arrays, one allocation each, so that AddressSanitizer sees their ends. Null on failure.
EMULATED_EXPORT void* emulated_allocate(size_t bytes) {
  void* at = nullptr;
#if EMULATED_WATCH
  if (posix_memalign(&at, 256, bytes + 2 * WATCH_PAD) != 0) return nullptr;
  at = static_cast<char*>(at) + WATCH_PAD;
  watch.arrays[reinterpret_cast<uintptr_t>(at)] = bytes;
  return at;
#else
  return posix_memalign(&at, 256, bytes) == 0 ? at : nullptr;
#endif
}
EMULATED_EXPORT void emulated_free(void* at) {
#if EMULATED_WATCH
  if (!at) return;
  watch.arrays.erase(reinterpret_cast<uintptr_t>(at));
  at = static_cast<char*>(at) - WATCH_PAD;
#endif
  free(at);
}

}  // extern "C"
