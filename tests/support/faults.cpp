// A disk that is full at one call of a process, for LD_PRELOAD: calls that write to a folder are
// counted, and the one asked for fails as the kernel would have it. See tests/faults.py.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long wanted, seen;
static const char* hit;

// From now on the `number`-th call that writes `below` this folder fails; 0: none does.
extern "C" __attribute__((visibility("default"))) void fault_at(const char* below, long number) {
  snprintf(folder, sizeof folder, "%s", below);
  wanted = number;
  seen = 0;
  hit = nullptr;
}

// The name of the call that has failed, or nothing.
extern "C" __attribute__((visibility("default"))) const char* fault_hit() { return hit; }

static bool fails(const char* call, const char* path) {
  if (!wanted) return false;
  char whole[2 * PATH_MAX] = "";
  if (*path != '/' && getcwd(whole, PATH_MAX)) strcat(whole, "/");
  strncat(whole, path, PATH_MAX - 1);
  if (strncmp(whole, folder, strlen(folder))) return false;
  // a lock is no result: without one the program goes on
  if (strstr(path, "/.lock-") || ++seen != wanted) return false;
  hit = call;
  errno = ENOSPC;
  return true;
}

static bool fails(const char* call, int file) {
  if (!wanted) return false;
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return false;
  path[length] = 0;
  return fails(call, path);
}

template <typename F>
static F next(F, const char* name) {
  return reinterpret_cast<F>(dlsym(RTLD_NEXT, name));
}

#define NEXT(name) static auto real = next(&name, #name)
#define EXPORT extern "C" __attribute__((visibility("default")))

static mode_t mode_of(int flags, va_list rest) { return flags & O_CREAT ? va_arg(rest, int) : 0; }

#define OPEN(name)                                           \
  EXPORT int name(const char* path, int flags, ...) {        \
    NEXT(name);                                              \
    va_list rest;                                            \
    va_start(rest, flags);                                   \
    mode_t mode = mode_of(flags, rest);                      \
    va_end(rest);                                            \
    if ((flags & O_CREAT) && fails("open", path)) return -1; \
    return real(path, flags, mode);                          \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                          \
  EXPORT int name(int at, const char* path, int flags, ...) { \
    NEXT(name);                                               \
    va_list rest;                                             \
    va_start(rest, flags);                                    \
    mode_t mode = mode_of(flags, rest);                       \
    va_end(rest);                                             \
    if ((flags & O_CREAT) && fails("open", path)) return -1;  \
    return real(at, path, flags, mode);                       \
  }
OPENAT(openat)
OPENAT(openat64)

EXPORT ssize_t write(int file, const void* bytes, size_t count) {
  NEXT(write);
  return fails("write", file) ? -1 : real(file, bytes, count);
}
EXPORT int fsync(int file) {
  NEXT(fsync);
  return fails("fsync", file) ? -1 : real(file);
}
// As on a file system far away: what was written is lost, and the file closed all the same.
EXPORT int close(int file) {
  NEXT(close);
  struct stat about;
  bool written = wanted && (fcntl(file, F_GETFL) & O_ACCMODE) != O_RDONLY && !fstat(file, &about) && about.st_size;
  if (!written || !fails("close", file)) return real(file);
  real(file);
  errno = ENOSPC;
  return -1;
}
EXPORT int mkdir(const char* path, mode_t mode) {
  NEXT(mkdir);
  struct stat there;  // Python tries before it looks
  return stat(path, &there) && fails("mkdir", path) ? -1 : real(path, mode);
}
EXPORT int chmod(const char* path, mode_t mode) {
  NEXT(chmod);
  return fails("chmod", path) ? -1 : real(path, mode);
}
EXPORT int rename(const char* from, const char* to) noexcept {
  NEXT(rename);
  return fails("rename", to) ? -1 : real(from, to);
}
