// What libraries that are preloaded share: which path a call means, and the function that it would have reached.
#pragma once

#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <string>

namespace {

std::string setting(const char* name) {
  const char* value = getenv(name);
  return value ? value : "";
}

std::string path_of(int descriptor) {
  char link[64], target[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = syscall(SYS_readlink, link, target, sizeof target);
  return length < 0 ? "" : std::string(target, length);
}

std::string path_at(int directory, const char* path) {
  if (path == nullptr || path[0] == '/') return path ? path : "";
  if (directory != AT_FDCWD) return path_of(directory) + "/" + path;
  char here[4096];
  return syscall(SYS_getcwd, here, sizeof here) > 0 ? std::string(here) + "/" + path : path;
}

template <typename Function>
Function next(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}

}  // namespace

// In a variadic function that opens: the mode, which is given only where a file may be created.
#define MODE_GIVEN_WITH(flags)              \
  mode_t mode = 0;                          \
  if ((flags) & (O_CREAT | O_TMPFILE)) {    \
    va_list rest;                           \
    va_start(rest, flags);                  \
    mode = va_arg(rest, mode_t);            \
    va_end(rest);                           \
  }

// OPENS(name, directory, parameters, arguments) for each function that opens `path`.
#define EVERY_OPEN(OPENS)                                                                        \
  OPENS(open, AT_FDCWD, (const char* path, int flags, ...), (path, flags, mode))                 \
  OPENS(open64, AT_FDCWD, (const char* path, int flags, ...), (path, flags, mode))               \
  OPENS(openat, from, (int from, const char* path, int flags, ...), (from, path, flags, mode))   \
  OPENS(openat64, from, (int from, const char* path, int flags, ...), (from, path, flags, mode))
