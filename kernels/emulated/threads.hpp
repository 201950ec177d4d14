// Defines CUDA's names for a C++ compiler, as far as kernels/ needs them. A CUDA thread is a fiber; fibers,
// barriers and launches are in runtime.cpp, which is built once and serves every module.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include <type_traits>
#include <utility>

// ---- qualifiers ---------------------------------------------------------------------------------------
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
// Plain __shared__ would silently become an ordinary variable here.
#define __shared__ _Pragma("GCC error \"write SHARED(type, name, n), and only in an entry point\"")

// ---- vector types -------------------------------------------------------------------------------------
// may_alias: a kernel may read four floats through a float4*, as CUDA code does.
#define EMULATED_VECTOR(type, name, alignment2, alignment4)                            \
  struct __attribute__((may_alias, aligned(alignment2))) name##2 { type x, y; };       \
  struct __attribute__((may_alias)) name##3 { type x, y, z; };                         \
  struct __attribute__((may_alias, aligned(alignment4))) name##4 { type x, y, z, w; }; \
  static inline name##2 make_##name##2(type x, type y) { return {x, y}; }              \
  static inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }   \
  static inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATED_VECTOR(float, float, 8, 16)
EMULATED_VECTOR(int, int, 8, 16)
EMULATED_VECTOR(unsigned, uint, 8, 16)
EMULATED_VECTOR(unsigned char, uchar, 2, 4)
#undef EMULATED_VECTOR

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// ---- the indices of a thread --------------------------------------------------------------------------
struct EmulatedIndex {
  unsigned x, y, z;
};

// One per OS thread; a switch of fibers rewrites threadIdx. The built-in variables below read it.
struct EmulatedContext {
  EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;
  int thread;        // threadIdx as one number
  uint64_t* values;  // [thread]: the thread's result of a warp operation
};

#if defined(__linux__) && defined(__GLIBC__)
// This model needs one fixed offset from the thread pointer; the default for a shared library is a call.
#define EMULATED_THREAD_LOCAL __thread __attribute__((tls_model("initial-exec")))
#else
#define EMULATED_THREAD_LOCAL __thread
#endif

#define EMULATED_EXPORT __attribute__((visibility("default")))

extern "C" {
extern EMULATED_EXPORT EMULATED_THREAD_LOCAL EmulatedContext emulated_context;

// The block's array of this site; the first thread to arrive makes it, every byte 0xFF.
EMULATED_EXPORT void* emulated_shared(const void* site, size_t bytes, size_t alignment, int large, const char* name);
// Where in the program a thread waits: threads that meet at different places have diverged. Each instance of a template
// has sites of its own.
struct EmulatedSite {
  const char* file;
  int line;
};
// Waits for all threads of the block, which must arrive at the same site.
EMULATED_EXPORT void emulated_barrier(const EmulatedSite* site);
// Waits in the same way and returns for how many of them `predicate` is true.
EMULATED_EXPORT int emulated_barrier_count(int predicate, const EmulatedSite* site);
// Waits for the lanes of `mask`. The thread's result is the `value` of lane `source`, with all bits set if
// that lane is not in `mask` or does not exist.
EMULATED_EXPORT void emulated_exchange(unsigned mask, int source, uint64_t value, const EmulatedSite* site);
// Waits for the lanes of `mask`. The thread's result is the mask of lanes whose `predicate` is true.
EMULATED_EXPORT void emulated_ballot(unsigned mask, int predicate, const EmulatedSite* site);
// A thread has waited for the kernel launched before its own.
EMULATED_EXPORT void emulated_wait_for_previous_kernel();
#if EMULATED_WATCH
// The running thread has begun to copy to shared memory, and: all of its copies have ended.
EMULATED_EXPORT void emulated_copy_begins(const void* target, size_t bytes);
EMULATED_EXPORT void emulated_copies_end();
#else
static inline void emulated_copy_begins(const void*, size_t) {}
static inline void emulated_copies_end() {}
#endif
// Ends the launch, which fails and says why.
EMULATED_EXPORT void emulated_give_up(const char* why);

struct EmulatedLaunch {
  const char* kernel;
  void (*body)(const void* arguments);  // one CUDA thread
  const void* arguments;
  EmulatedIndex grid, block;
  int reverse;          // threads and blocks in reverse order
  int workers;          // OS threads to use, this one included
  char* message;        // room for EMULATED_MESSAGE_BYTES
  size_t shared_bytes;  // of the SHARED_LARGE array
  int programmatic;     // every thread must wait once for the kernel before
};
enum { EMULATED_MESSAGE_BYTES = 512 };
// Runs every block and returns 0, or 1 with a reason in `message`.
EMULATED_EXPORT int emulated_run(const EmulatedLaunch* launch);
}

#define threadIdx (::emulated_context.threadIdx)
#define blockIdx (::emulated_context.blockIdx)
#define blockDim (::emulated_context.blockDim)
#define gridDim (::emulated_context.gridDim)
#define warpSize 32

// ---- barriers and warps -------------------------------------------------------------------------------
// These are macros, so that a wait knows its line.
#define EMULATED_SITE                                         \
  (__extension__({                                            \
    static const ::EmulatedSite site_ = {__FILE__, __LINE__}; \
    &site_;                                                   \
  }))
#define __syncthreads() (::emulated_barrier(EMULATED_SITE))
#define __syncthreads_count(predicate) (::emulated_barrier_count((predicate) ? 1 : 0, EMULATED_SITE))
#define __syncthreads_or(predicate) (::emulated_barrier_count((predicate) ? 1 : 0, EMULATED_SITE) != 0)
#define __syncthreads_and(predicate) (::emulated_barrier_count((predicate) ? 0 : 1, EMULATED_SITE) == 0)

#define EMULATED_SYNCWARP_(mask, ...) (::emulated_ballot(mask, 0, EMULATED_SITE))
#define __syncwarp(...) EMULATED_SYNCWARP_(__VA_ARGS__ __VA_OPT__(, ) 0xffffffffu)
#define __ballot_sync(mask, predicate) (::emulated::ballot(mask, (predicate) ? 1 : 0, EMULATED_SITE))
#define __any_sync(mask, predicate) (::emulated::ballot(mask, (predicate) ? 1 : 0, EMULATED_SITE) != 0)
#define __all_sync(mask, predicate) (::emulated::ballot(mask, (predicate) ? 0 : 1, EMULATED_SITE) == 0)

namespace emulated {

inline int lane() { return emulated_context.thread & 31; }

inline unsigned ballot(unsigned mask, int predicate, const EmulatedSite* site) {
  const int me = emulated_context.thread;
  emulated_ballot(mask, predicate, site);
  return static_cast<unsigned>(emulated_context.values[me]);
}

template <typename T>
T exchange(unsigned mask, T value, int source, const EmulatedSite* site) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "a shuffle moves up to 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  const int me = emulated_context.thread;
  emulated_exchange(mask, source, bits, site);
  bits = emulated_context.values[me];
  memcpy(&value, &bits, sizeof(T));
  return value;
}

// Source lanes are those of the CUDA programming guide; one outside the segment is the lane itself.
template <typename T>
T shuffle(unsigned mask, T value, int source, int width, const EmulatedSite* site) {
  return exchange(mask, value, (lane() & ~(width - 1)) | (source & (width - 1)), site);
}
template <typename T>
T shuffle_up(unsigned mask, T value, unsigned delta, int width, const EmulatedSite* site) {
  const int me = lane(), source = me - static_cast<int>(delta);
  return exchange(mask, value, source < (me & ~(width - 1)) ? me : source, site);
}
template <typename T>
T shuffle_down(unsigned mask, T value, unsigned delta, int width, const EmulatedSite* site) {
  const int me = lane(), source = me + static_cast<int>(delta);
  return exchange(mask, value, source > (me | (width - 1)) ? me : source, site);
}
template <typename T>
T shuffle_xor(unsigned mask, T value, int bits, int width, const EmulatedSite* site) {
  const int me = lane(), source = me ^ bits;
  return exchange(mask, value, source > (me | (width - 1)) ? me : source, site);
}

}  // namespace emulated

#define EMULATED_SHUFFLE_(function, mask, value, other, width, ...) \
  (::emulated::function(mask, value, other, width, EMULATED_SITE))
#define __shfl_sync(mask, value, ...) EMULATED_SHUFFLE_(shuffle, mask, value, __VA_ARGS__, 32, 0)
#define __shfl_up_sync(mask, value, ...) EMULATED_SHUFFLE_(shuffle_up, mask, value, __VA_ARGS__, 32, 0)
#define __shfl_down_sync(mask, value, ...) EMULATED_SHUFFLE_(shuffle_down, mask, value, __VA_ARGS__, 32, 0)
#define __shfl_xor_sync(mask, value, ...) EMULATED_SHUFFLE_(shuffle_xor, mask, value, __VA_ARGS__, 32, 0)

// ---- atomics: integers only, since the order of float additions would vary ------------------------------
#define EMULATED_ATOMICS(type)                                                                                       \
  static inline type atomicAdd(type* at, type value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }     \
  static inline type atomicSub(type* at, type value) { return __atomic_fetch_sub(at, value, __ATOMIC_RELAXED); }     \
  static inline type atomicAnd(type* at, type value) { return __atomic_fetch_and(at, value, __ATOMIC_RELAXED); }     \
  static inline type atomicOr(type* at, type value) { return __atomic_fetch_or(at, value, __ATOMIC_RELAXED); }       \
  static inline type atomicExch(type* at, type value) { return __atomic_exchange_n(at, value, __ATOMIC_RELAXED); }   \
  static inline type atomicCAS(type* at, type expected, type value) {                                                \
    __atomic_compare_exchange_n(at, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);                    \
    return expected;                                                                                                 \
  }                                                                                                                  \
  static inline type atomicMax(type* at, type value) {                                                               \
    type old = __atomic_load_n(at, __ATOMIC_RELAXED);                                                                \
    while (old < value && !__atomic_compare_exchange_n(at, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) { \
    }                                                                                                                \
    return old;                                                                                                      \
  }                                                                                                                  \
  static inline type atomicMin(type* at, type value) {                                                               \
    type old = __atomic_load_n(at, __ATOMIC_RELAXED);                                                                \
    while (value < old && !__atomic_compare_exchange_n(at, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) { \
    }                                                                                                                \
    return old;                                                                                                      \
  }
EMULATED_ATOMICS(int)
EMULATED_ATOMICS(unsigned)
EMULATED_ATOMICS(unsigned long long)
#undef EMULATED_ATOMICS
float atomicAdd(float*, float) = delete;  // the sum would depend on the order

static inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// ---- arithmetic ---------------------------------------------------------------------------------------
static inline int max(int a, int b) { return a > b ? a : b; }
static inline int min(int a, int b) { return a < b ? a : b; }
static inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
static inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline float min(float a, float b) { return fminf(a, b); }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
static inline int __float_as_int(float x) {
  int bits;
  memcpy(&bits, &x, 4);
  return bits;
}
static inline float __int_as_float(int bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
// These are macros because the C library has functions of these names.
#define __expf(x) expf(x)
#define __logf(x) logf(x)
template <typename T>
static inline T __ldg(const T* at) {
  return *at;
}

// ---- launching: any signature from an array of 8-byte slots --------------------------------------------
namespace emulated {

union Argument {
  void* pointer;
  int integer;
  float real;
};

// One letter for each kind of argument, as cnnlib/device/emulated.py writes it.
template <typename T>
struct Letter {
  static_assert(std::is_same<T, int>::value || std::is_same<T, unsigned>::value || std::is_same<T, float>::value,
                "a kernel's parameters are pointers, int, unsigned or float");
  static constexpr char value = std::is_same<T, float>::value ? 'f' : 'i';
};
template <typename T>
struct Letter<T*> {
  static constexpr char value = '*';
};  // any array
template <typename T>
struct Letter<const T*> : Letter<T*> {};
template <>
struct Letter<float*> {
  static constexpr char value = 'F';
};
template <>
struct Letter<double*> {
  static constexpr char value = 'D';
};
template <>
struct Letter<int*> {
  static constexpr char value = 'I';
};
template <>
struct Letter<unsigned*> {
  static constexpr char value = 'U';
};
template <>
struct Letter<signed char*> {
  static constexpr char value = 'b';
};
template <>
struct Letter<unsigned char*> {
  static constexpr char value = 'B';
};
template <>
struct Letter<short*> {
  static constexpr char value = 'h';
};
template <>
struct Letter<unsigned short*> {
  static constexpr char value = 'H';
};
template <>
struct Letter<long long*> {
  static constexpr char value = 'L';
};
template <>
struct Letter<long*> {
  static constexpr char value = 'L';
};
template <>
struct Letter<unsigned long long*> {
  static constexpr char value = 'Q';
};
template <>
struct Letter<unsigned long*> {
  static constexpr char value = 'Q';
};

template <typename T>
struct Read {
  static T from(const Argument& slot) {
    if constexpr (std::is_pointer<T>::value)
      return static_cast<T>(slot.pointer);
    else if constexpr (std::is_same<T, float>::value)
      return slot.real;
    else
      return static_cast<T>(slot.integer);
  }
};

const char* letter_name(char letter);

template <auto kernel>
struct Entry;
template <typename... Parameters, void (*kernel)(Parameters...)>
struct Entry<kernel> {
  template <size_t... I>
  static void call(const Argument* slots, std::index_sequence<I...>) {
    kernel(Read<Parameters>::from(slots[I])...);
  }
  static void body(const void* arguments) {
    call(static_cast<const Argument*>(arguments), std::index_sequence_for<Parameters...>{});
  }
  static int launch(const EmulatedLaunch* wanted, const char* given) {
    static const char letters[] = {Letter<std::remove_cv_t<Parameters>>::value..., 0};
    const size_t count = sizeof...(Parameters);
    if (strlen(given) != count) {
      snprintf(wanted->message, EMULATED_MESSAGE_BYTES, "kernel %s takes %zu arguments, %zu were given", wanted->kernel,
               count, strlen(given));
      return 1;
    }
    for (size_t i = 0; i < count; ++i) {
      const bool pointer = given[i] != 'i' && given[i] != 'f';
      if (letters[i] != given[i] && !(pointer && letters[i] == '*')) {
        snprintf(wanted->message, EMULATED_MESSAGE_BYTES, "kernel %s: argument %zu is %s, given %s", wanted->kernel, i,
                 letter_name(letters[i]), letter_name(given[i]));
        return 1;
      }
    }
    EmulatedLaunch launch = *wanted;
    launch.body = body;
    return emulated_run(&launch);
  }
};

inline const char* letter_name(char letter) {
  switch (letter) {
    case 'i':
      return "an int";
    case 'f':
      return "a float";
    case 'F':
      return "a float32 array";
    case 'D':
      return "a float64 array";
    case 'I':
      return "an int32 array";
    case 'U':
      return "a uint32 array";
    case 'b':
      return "an int8 array";
    case 'B':
      return "a uint8 array";
    case 'h':
      return "an int16 array";
    case 'H':
      return "a uint16 array";
    case 'L':
      return "an int64 array";
    case 'Q':
      return "a uint64 array";
    default:
      return "an array";
  }
}

}  // namespace emulated

// cnnlib/device/emulated.py appends this to a source for each of its kernels.
#define EMULATED_LAUNCHER(name)                                                                   \
  extern "C" EMULATED_EXPORT int launch_##name(const EmulatedLaunch* launch, const char* given) { \
    return ::emulated::Entry<&name>::launch(launch, given);                                       \
  }
