// Watches what kernels read and write: bytes of device memory, accesses outside every array, and two threads that
// meet at one element with nothing between them that orders them.
//
// Part of runtime.cpp where EMULATED_WATCH is 1. The compiler then builds kernels for its thread sanitizer, which calls
// a function before every access; the functions are these ones, and its own library is not linked. One OS thread runs
// all blocks. Locals in registers are not seen, and neither are caches: bytes are those that a kernel asks for.
//
// What orders two accesses of one block is a barrier between them, or in one warp a warp operation. Nothing orders those
// of two blocks of a launch. A copy of async.cuh is on its way until its thread waits for its copies; it is not known
// which of several groups a thread waits for, so that it waits for all of them. Lanes that write the same value to the
// same element on purpose, as those of softmax_cross_entropy in tuned/step.cuh, meet like any others.
#pragma once
#include <dlfcn.h>

#include <map>
#include <unordered_map>

namespace {

constexpr size_t WATCH_PAD = 4096;  // bytes around device arrays, which belong to none
constexpr int MAX_FINDINGS = 8;     // of a launch

struct Access {
  int64_t block = -1;
  int thread = 0;
  unsigned barriers = 0, meetings = 0;  // that the block and the warp have passed
};

// The last write to an element, and the last two threads that read it.
struct Element {
  Access writer, reader, other;
};

struct Watch {
  std::map<uintptr_t, size_t> arrays;  // of the device: first byte and size
  std::unordered_map<uintptr_t, Element> device, shared;
  std::unordered_map<uintptr_t, int> on_their_way;  // elements of shared memory: the thread that copies to them
  uint64_t read = 0, written = 0;
  std::string findings;  // a line each: the kind, its words
  int found = 0;
};
Watch& watch = *new Watch;  // arrays are freed until the process ends

void forget_shared_accesses() {
  watch.shared.clear();
  watch.on_their_way.clear();
}

// When another launch begins.
void forget_accesses() {
  watch.device.clear();
  watch.read = watch.written = 0;
  watch.findings.clear();
  watch.found = 0;
}

bool same_warp(int a, int b) { return a / WARP == b / WARP; }

// Whether nothing orders an earlier access and this one of other threads.
bool conflict(const Access& before, const Access& now) {
  if (before.block < 0) return false;
  if (before.block != now.block) return true;
  if (before.thread == now.thread || before.barriers != now.barriers) return false;
  return !same_warp(before.thread, now.thread) || before.meetings == now.meetings;
}

struct Where {
  enum Kind { DEVICE, SHARED_ARRAY, OWN, NOWHERE } kind;
  const char* name;
  uintptr_t first;
  size_t bytes;
};

bool within(uintptr_t at, const void* first, size_t bytes) { return at - reinterpret_cast<uintptr_t>(first) < bytes; }

Where where(uintptr_t at, size_t bytes) {
  Worker& w = *this_worker;
  if (within(at, w.arena, Worker::arena_bytes())) {
    for (int i = 0; i < w.arrays; ++i)
      if (within(at, w.array[i].at, w.array[i].bytes) && within(at + bytes - 1, w.array[i].at, w.array[i].bytes))
        return {Where::SHARED_ARRAY, w.array[i].name, reinterpret_cast<uintptr_t>(w.array[i].at), w.array[i].bytes};
    return {Where::NOWHERE, "", 0, 0};
  }
  auto next = watch.arrays.upper_bound(at);
  if (next != watch.arrays.begin()) {
    --next;
    if (at + bytes <= next->first + next->second) return {Where::DEVICE, "", next->first, next->second};
  }
  // the thread's own stack lies above this function's frame
  if (within(at, __builtin_frame_address(0), STACK)) return {Where::OWN, "", 0, 0};
  if (within(at, &emulated_context, sizeof emulated_context) || within(at, &w, sizeof w) ||
      within(at, w.arguments, 64 * sizeof(uint64_t)))
    return {Where::OWN, "", 0, 0};
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(at), &info)) return {Where::OWN, "", 0, 0};
  return {Where::NOWHERE, "", 0, 0};
}

// Where an address that belongs to no array lies, as seen from the nearest one.
void describe_outside(uintptr_t at, char* text, size_t size) {
  Worker& w = *this_worker;
  if (within(at, w.arena, Worker::arena_bytes())) {
    const SharedArray* nearest = nullptr;
    for (int i = 0; i < w.arrays; ++i)
      if (reinterpret_cast<uintptr_t>(w.array[i].at) <= at) nearest = &w.array[i];
    if (nearest)
      snprintf(text, size, "%lld bytes behind shared array %s, which has %zu",
               static_cast<long long>(at - reinterpret_cast<uintptr_t>(nearest->at) - nearest->bytes), nearest->name,
               nearest->bytes);
    else
      snprintf(text, size, "in front of all shared arrays");
    return;
  }
  const auto next = watch.arrays.upper_bound(at);
  const uintptr_t to_next = next == watch.arrays.end() ? UINTPTR_MAX : next->first - at;
  uintptr_t behind = UINTPTR_MAX;
  size_t bytes = 0;
  if (next != watch.arrays.begin()) {
    const auto before = std::prev(next);
    bytes = before->second, behind = at - before->first - bytes;
  }
  if (to_next < behind)
    snprintf(text, size, "%llu bytes in front of an array of %zu", static_cast<unsigned long long>(to_next),
             next->second);
  else
    snprintf(text, size, "%llu bytes behind an array of %zu", static_cast<unsigned long long>(behind), bytes);
}

// A finding of the launch; each kind of a kernel once.
__attribute__((format(printf, 2, 3))) void note_finding(const char* kind, const char* format, ...) {
  const std::string line = std::string(kind) + '\t' + this_worker->launch->wanted->kernel + '\t';
  if (watch.found == MAX_FINDINGS || watch.findings.find(line) != std::string::npos) return;
  ++watch.found;
  char text[256];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  watch.findings += line + text + '\n';
}

void note_conflict(const Where& place, uintptr_t at, const Access& before, const Access& now, const char* verb,
                   const char* other) {
  const long long index = static_cast<long long>(at - place.first);
  if (place.kind == Where::SHARED_ARRAY)
    note_finding("barrier",
                 "thread %d %s byte %lld of shared array %s, which thread %d %s, with no barrier between them",
                 now.thread, verb, index, place.name, before.thread, other);
  else if (before.block != now.block)
    note_finding("blocks", "block %lld %s byte %lld of an array of %zu, which block %lld %s in the same launch",
                 static_cast<long long>(now.block), verb, index, place.bytes, static_cast<long long>(before.block),
                 other);
  else
    note_finding("threads",
                 "thread %d %s byte %lld of an array of %zu, which thread %d of the block %s, with no barrier "
                 "between them",
                 now.thread, verb, index, place.bytes, before.thread, other);
}

void watch_access(uintptr_t at, size_t bytes, bool writes) {
  if (!this_worker || !this_worker->launch) return;
  Worker& w = *this_worker;
  const Where place = where(at, bytes);
  if (place.kind == Where::OWN) return;
  const int me = emulated_context.thread;
  if (place.kind == Where::NOWHERE) {
    char text[160];
    describe_outside(at, text, sizeof text);
    w.report("thread %d %s %zu bytes outside every array, %s", me, writes ? "writes" : "reads", bytes, text);
    w.abandon();
  }
  const bool device = place.kind == Where::DEVICE;
  if (device) (writes ? watch.written : watch.read) += bytes;
  const EmulatedIndex &b = emulated_context.blockIdx, &grid = emulated_context.gridDim;
  const int64_t block = b.x + int64_t{grid.x} * (b.y + int64_t{grid.y} * b.z);
  const Access now{block, me, w.barriers_passed, w.warp_meetings[me / WARP]};
  for (uintptr_t each = at; each < at + bytes; each += bytes < 4 ? bytes : 4) {
    const auto copied = device ? watch.on_their_way.end() : watch.on_their_way.find(each);
    if (copied != watch.on_their_way.end())
      note_finding("copy", "thread %d %s byte %lld of shared array %s while a copy of thread %d to it is on its way",
                   me, writes ? "writes" : "reads", static_cast<long long>(each - place.first), place.name,
                   copied->second);
    Element& element = (device ? watch.device : watch.shared)[each];
    if (conflict(element.writer, now))
      note_conflict(place, each, element.writer, now, writes ? "writes" : "reads", "writes");
    if (writes) {
      if (conflict(element.reader, now)) note_conflict(place, each, element.reader, now, "writes", "reads");
      if (conflict(element.other, now)) note_conflict(place, each, element.other, now, "writes", "reads");
      element.writer = now;
    } else {
      if (element.reader.block != now.block || element.reader.thread != now.thread) element.other = element.reader;
      element.reader = now;
    }
  }
}

}  // namespace

extern "C" {

// Bytes of device memory that the last launch read and wrote, and what was found, a line each.
EMULATED_EXPORT const char* emulated_watched(uint64_t* read, uint64_t* written) {
  *read = watch.read;
  *written = watch.written;
  return watch.findings.c_str();
}

#define WATCHED(bytes)                                                                                               \
  EMULATED_EXPORT void __tsan_read##bytes(void* at) { watch_access(reinterpret_cast<uintptr_t>(at), bytes, false); } \
  EMULATED_EXPORT void __tsan_write##bytes(void* at) { watch_access(reinterpret_cast<uintptr_t>(at), bytes, true); }
WATCHED(1)
WATCHED(2)
WATCHED(4)
WATCHED(8)
WATCHED(16)
#undef WATCHED
#define WATCHED(bytes)                                           \
  EMULATED_EXPORT void __tsan_unaligned_read##bytes(void* at) {  \
    watch_access(reinterpret_cast<uintptr_t>(at), bytes, false); \
  }                                                              \
  EMULATED_EXPORT void __tsan_unaligned_write##bytes(void* at) { \
    watch_access(reinterpret_cast<uintptr_t>(at), bytes, true);  \
  }
WATCHED(2)
WATCHED(4)
WATCHED(8)
WATCHED(16)
#undef WATCHED
EMULATED_EXPORT void __tsan_read_range(void* at, size_t bytes) {
  watch_access(reinterpret_cast<uintptr_t>(at), bytes, false);
}
EMULATED_EXPORT void __tsan_write_range(void* at, size_t bytes) {
  watch_access(reinterpret_cast<uintptr_t>(at), bytes, true);
}
EMULATED_EXPORT void __tsan_init() {}
EMULATED_EXPORT void __tsan_func_entry(void*) {}
EMULATED_EXPORT void __tsan_func_exit() {}

void emulated_copy_begins(const void* target, size_t bytes) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(target);
  for (uintptr_t each = at; each < at + bytes; each += 4) watch.on_their_way[each] = emulated_context.thread;
}
void emulated_copies_end() {
  for (auto each = watch.on_their_way.begin(); each != watch.on_their_way.end();)
    each = each->second == emulated_context.thread ? watch.on_their_way.erase(each) : std::next(each);
}

// Atomic operations are what the compiler calls instead of doing them. They count as bytes, and they race with nothing.
EMULATED_EXPORT void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
#define WATCHED_ATOMIC(bits, type, name)                                                        \
  EMULATED_EXPORT type __tsan_atomic##bits##_fetch_##name(volatile type* at, type value, int) { \
    watch.read += sizeof(type), watch.written += sizeof(type);                                  \
    return __atomic_fetch_##name(at, value, __ATOMIC_SEQ_CST);                                  \
  }
#define WATCHED_ATOMICS(bits, type)                                                                                   \
  WATCHED_ATOMIC(bits, type, add)                                                                                     \
  WATCHED_ATOMIC(bits, type, sub)                                                                                     \
  WATCHED_ATOMIC(bits, type, and)                                                                                     \
  WATCHED_ATOMIC(bits, type, or)                                                                                      \
  EMULATED_EXPORT type __tsan_atomic##bits##_load(const volatile type* at, int) {                                     \
    return __atomic_load_n(at, __ATOMIC_SEQ_CST);                                                                     \
  }                                                                                                                   \
  EMULATED_EXPORT void __tsan_atomic##bits##_store(volatile type* at, type value, int) {                              \
    __atomic_store_n(at, value, __ATOMIC_SEQ_CST);                                                                    \
  }                                                                                                                   \
  EMULATED_EXPORT type __tsan_atomic##bits##_exchange(volatile type* at, type value, int) {                           \
    return __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST);                                                          \
  }                                                                                                                   \
  EMULATED_EXPORT int __tsan_atomic##bits##_compare_exchange_strong(volatile type* at, type* expected, type value,    \
                                                                    int, int) {                                       \
    return __atomic_compare_exchange_n(at, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);               \
  }                                                                                                                   \
  EMULATED_EXPORT int __tsan_atomic##bits##_compare_exchange_weak(volatile type* at, type* expected, type value, int, \
                                                                  int) {                                              \
    return __atomic_compare_exchange_n(at, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);               \
  }
WATCHED_ATOMICS(32, int)
WATCHED_ATOMICS(64, long)
#undef WATCHED_ATOMICS
#undef WATCHED_ATOMIC

}  // extern "C"
