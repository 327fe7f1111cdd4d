// Faults of storage, for tests: a library to be preloaded that counts what a process does to the files below a directory, and
// lets the n-th of it fail or kills the process there.
//
// STORAGE_DIRECTORY  absolute; without it nothing is counted
// STORAGE_OPERATIONS "changes" (what alters a file or directory) or "reads" (opening for reading, and reading)
// STORAGE_AT         the number of the operation, from 1; 0 for none
// STORAGE_ACTION     "kill", "stop" (as SIGSTOP does), "short" (a write that takes half), "vanish" (the directory is renamed), or
//                    the number of an error
// STORAGE_LASTING    "1": also what comes after it
// STORAGE_ONLY       a text; other operations than those whose line holds it are not counted
// STORAGE_LOG        a file that every operation is written to: its name and its paths, divided by tabs
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>

#include <atomic>

#include "preloaded.h"

namespace {

std::atomic<long> count{0};

enum class Fate { well, fails, halved, killed };

// What becomes of the next operation on a path; sets errno where it fails.
Fate fate(const char* kind, const char* operation, const std::string& path, const std::string& other = "") {
  std::string directory = setting("STORAGE_DIRECTORY");
  if (directory.empty() || setting("STORAGE_OPERATIONS") != kind) return Fate::well;
  if (path.compare(0, directory.size(), directory) != 0) return Fate::well;
  std::string line = std::string(operation) + "\t" + path + (other.empty() ? "" : "\t" + other) + "\n";
  if (line.find(setting("STORAGE_ONLY")) == std::string::npos) return Fate::well;
  long number = ++count;
  std::string log = setting("STORAGE_LOG");
  if (!log.empty()) {
    int file = syscall(SYS_openat, AT_FDCWD, log.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0666);
    (void)!syscall(SYS_write, file, line.data(), line.size());
    syscall(SYS_close, file);
  }
  long at = atol(setting("STORAGE_AT").c_str());
  if (at == 0 || (setting("STORAGE_LASTING") == "1" ? number < at : number != at)) return Fate::well;
  std::string action = setting("STORAGE_ACTION");
  if (action == "kill") return Fate::killed;
  if (action == "stop") {
    kill(getpid(), SIGSTOP);
    return Fate::well;
  }
  if (action == "short") return Fate::halved;
  if (action == "vanish") {
    syscall(SYS_rename, directory.c_str(), (directory + ".gone").c_str());
    return Fate::well;
  }
  // A full disk has room for what takes none.
  if (atoi(action.c_str()) == ENOSPC && (!strncmp(operation, "unlink", 6) || !strcmp(operation, "rmdir"))) return Fate::well;
  errno = atoi(action.c_str());
  return Fate::fails;
}

[[noreturn]] void die() {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

}  // namespace

// What has no half: it happens or does not.
#define WHOLE(kind, name, path, parameters, arguments)                 \
  extern "C" int name parameters {                                     \
    static auto real = next<int(*) parameters>(#name);                 \
    Fate what = fate(kind, #name, path);                               \
    if (what == Fate::killed) die();                                   \
    return what == Fate::fails ? -1 : real arguments;                  \
  }

WHOLE("changes", fsync, path_of(file), (int file), (file))
WHOLE("changes", fdatasync, path_of(file), (int file), (file))
WHOLE("changes", ftruncate, path_of(file), (int file, off_t length), (file, length))
WHOLE("changes", ftruncate64, path_of(file), (int file, off64_t length), (file, length))
WHOLE("changes", mkdir, path_at(AT_FDCWD, path), (const char* path, mode_t mode), (path, mode))
WHOLE("changes", mkdirat, path_at(at, path), (int at, const char* path, mode_t mode), (at, path, mode))
WHOLE("changes", rmdir, path_at(AT_FDCWD, path), (const char* path), (path))
WHOLE("changes", unlink, path_at(AT_FDCWD, path), (const char* path), (path))
WHOLE("changes", unlinkat, path_at(at, path), (int at, const char* path, int flags), (at, path, flags))

#define RENAME(name, from, to, parameters, arguments)                  \
  extern "C" int name parameters {                                     \
    static auto real = next<int(*) parameters>(#name);                 \
    Fate what = fate("changes", "rename", from, to);                   \
    if (what == Fate::killed) die();                                   \
    return what == Fate::fails ? -1 : real arguments;                  \
  }

RENAME(rename, path_at(AT_FDCWD, a), path_at(AT_FDCWD, b), (const char* a, const char* b), (a, b))
RENAME(renameat, path_at(f, a), path_at(t, b), (int f, const char* a, int t, const char* b), (f, a, t, b))
RENAME(renameat2, path_at(f, a), path_at(t, b), (int f, const char* a, int t, const char* b, unsigned x), (f, a, t, b, x))

// What is written in part before a kill, as the disk may find it.
#define WRITES(name, amount, parameters, arguments, part)                \
  extern "C" ssize_t name parameters {                                 \
    static auto real = next<ssize_t(*) parameters>(#name);             \
    Fate what = fate("changes", "write", path_of(file));               \
    if (what == Fate::fails) return -1;                                \
    if ((what == Fate::halved || what == Fate::killed) && amount > 1) {    \
      ssize_t taken = real part;                                       \
      if (what == Fate::killed) die();                                 \
      return taken;                                                    \
    }                                                                  \
    if (what == Fate::killed) die();                                   \
    return real arguments;                                             \
  }

WRITES(write, size, (int file, const void* data, size_t size), (file, data, size), (file, data, size / 2))
WRITES(pwrite, size, (int file, const void* data, size_t size, off_t at), (file, data, size, at), (file, data, size / 2, at))
WRITES(pwrite64, size, (int file, const void* data, size_t size, off64_t at), (file, data, size, at),
       (file, data, size / 2, at))
WRITES(writev, parts, (int file, const iovec* data, int parts), (file, data, parts), (file, data, parts / 2))
WRITES(sendfile, size, (int file, int from, off_t* at, size_t size), (file, from, at, size), (file, from, at, size / 2))
WRITES(sendfile64, size, (int file, int from, off64_t* at, size_t size), (file, from, at, size), (file, from, at, size / 2))

#define READS(name, parameters, arguments)                             \
  extern "C" ssize_t name parameters {                                 \
    static auto real = next<ssize_t(*) parameters>(#name);             \
    Fate what = fate("reads", "read", path_of(file));                  \
    if (what == Fate::killed) die();                                   \
    return what == Fate::fails ? -1 : real arguments;                  \
  }

READS(read, (int file, void* data, size_t size), (file, data, size))
READS(pread, (int file, void* data, size_t size, off_t at), (file, data, size, at))
READS(pread64, (int file, void* data, size_t size, off64_t at), (file, data, size, at))
READS(preadv, (int file, const iovec* data, int parts, off_t at), (file, data, parts, at))
READS(preadv64, (int file, const iovec* data, int parts, off64_t at), (file, data, parts, at))
READS(preadv2, (int file, const iovec* data, int parts, off_t at, int flags), (file, data, parts, at, flags))
READS(preadv64v2, (int file, const iovec* data, int parts, off64_t at, int flags), (file, data, parts, at, flags))

#define OPENS(name, at, parameters, arguments)                         \
  extern "C" int name parameters {                                     \
    MODE_GIVEN_WITH(flags)                                             \
    static auto real = next<int (*) parameters>(#name);                \
    bool changes = flags & (O_CREAT | O_TRUNC);                        \
    Fate what = fate(changes ? "changes" : "reads", "open", path_at(at, path)); \
    if (what == Fate::killed) die();                                   \
    return what == Fate::fails ? -1 : real arguments;                  \
  }

EVERY_OPEN(OPENS)
