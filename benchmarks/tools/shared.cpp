// A file system that several nodes share and that is slow to show each what the others did: a library to be preloaded into all
// processes that take part. It also counts what a process opens, looks up and reads.
//
// SHARED_DIRECTORY  absolute; what lies below it is shared
// SHARED_JOURNAL    a directory beside it, on the same file system: what was done, and what was replaced or removed
// SHARED_NODE       the name of this process's node; what its own node did is seen at once
// SHARED_DELAY      seconds until what another node created, renamed, replaced or removed is seen here; what is written into a
//                   file that is there already is seen at once
// SHARED_RENAME     seconds that renaming takes, half of them before others can see it
// SHARED_LOCKS      "none": locks fail with ENOLCK; "node": byte ranges are locked against this node's processes alone
// MASTER_PORT       of the processes' store: messages that are sent there are counted
//
// A change is made and written down under the journal's lock, with a link to what it took away. A path is looked up under the
// same lock: what others did within the delay is taken back in thought, which leads to what the path meant before.
#include <dirent.h>
#include <errno.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <set>
#include <vector>

#include "preloaded.h"

namespace {

enum Count { OPENED, LOOKED_UP, LISTED, READ, MAPPED, KINDS };
std::atomic<long> messages{0};  // to the store
std::atomic<long> counts[2][KINDS];  // below the directory, and elsewhere

struct Event {
  double time;
  std::string node, kind, path, other, kept;
};

std::mutex mutex;
std::vector<Event> events;
off_t known = 0;       // bytes of the journal that are in `events`
std::string unread;    // the part of a line after them
std::atomic<long> views{0};

double now() {
  timespec time;
  clock_gettime(CLOCK_REALTIME, &time);
  return time.tv_sec + time.tv_nsec * 1e-9;
}

bool within(const std::string& path, const std::string& folder) {
  return path.compare(0, folder.size(), folder) == 0 && (path.size() == folder.size() || path[folder.size()] == '/');
}

bool is_shared(const std::string& path) {
  std::string directory = setting("SHARED_DIRECTORY");
  return !directory.empty() && within(path, directory);
}

std::string normal(std::string path) {
  for (size_t at; (at = path.find("//")) != std::string::npos;) path.erase(at, 1);
  for (size_t at; (at = path.find("/./")) != std::string::npos;) path.erase(at, 2);
  if (path.size() > 2 && path.compare(path.size() - 2, 2, "/.") == 0) path.erase(path.size() - 2);
  if (path.size() > 1 && path.back() == '/') path.pop_back();
  return path;
}

void add(Count kind, const std::string& path, long amount = 1) { counts[!is_shared(path)][kind] += amount; }

bool exists(const std::string& path) {
  struct stat found;
  return syscall(SYS_newfstatat, AT_FDCWD, path.c_str(), &found, AT_SYMLINK_NOFOLLOW) == 0;
}

// The journal, locked; inactive where there is none.
class Journal {
 public:
  explicit Journal(int mode) : place_(setting("SHARED_JOURNAL")) {
    if (place_.empty()) return;
    file_ = syscall(SYS_openat, AT_FDCWD, (place_ + "/events").c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (file_ >= 0) while (syscall(SYS_flock, file_, mode) < 0 && errno == EINTR) {}
  }
  ~Journal() {
    int error = errno;
    if (file_ >= 0) syscall(SYS_close, file_);
    errno = error;
  }
  bool active() const { return file_ >= 0; }

  // Keeps what lies under a path that is about to be taken; the name under which it stays, or nothing.
  std::string keep(const std::string& path) {
    struct stat found;
    if (syscall(SYS_newfstatat, AT_FDCWD, path.c_str(), &found, AT_SYMLINK_NOFOLLOW) != 0) return "";
    struct stat written;
    fstat(file_, &written);
    std::string kept = place_ + "/" + std::to_string(written.st_size);
    syscall(SYS_unlinkat, AT_FDCWD, kept.c_str(), 0);
    if (S_ISDIR(found.st_mode)) syscall(SYS_mkdirat, AT_FDCWD, kept.c_str(), 0777);
    else syscall(SYS_linkat, AT_FDCWD, path.c_str(), AT_FDCWD, kept.c_str(), 0);
    return kept;
  }

  void write(const char* kind, const std::string& path, const std::string& other = "", const std::string& kept = "") {
    int error = errno;
    char time[32];
    snprintf(time, sizeof time, "%.6f", now());
    std::string line = time;
    for (const std::string& part : {setting("SHARED_NODE"), std::string(kind), path, other, kept}) line += "\t" + part;
    line += "\n";
    (void)!syscall(SYS_write, file_, line.data(), line.size());
    errno = error;
  }

  // What a path of this node's view lies under; empty where it does not see anything there.
  std::string lookup(const std::string& path, std::set<std::string>* beside = nullptr) {
    std::lock_guard<std::mutex> guard(mutex);
    read();
    double since = now() - atof(setting("SHARED_DELAY").c_str());
    std::string node = setting("SHARED_NODE"), at = path;
    bool follows = true;
    for (const Event& event : events) {
      if (event.time <= since) continue;
      if (beside) for (const std::string* name : {&event.path, &event.other}) {
        size_t slash = name->rfind('/');
        std::string folder = slash == std::string::npos ? "" : name->substr(0, slash);
        if (!folder.empty() && (folder == path || folder == at)) beside->insert(name->substr(slash + 1));
      }
      bool renames = event.kind == "rename";
      const std::string& taken = renames ? event.other : event.path;
      if (event.node == node) {
        for (const std::string* own : {&event.path, &event.other})
          if (!own->empty() && (within(path, *own) || within(*own, path))) at = path, follows = true;
      } else if (follows && renames && within(at, event.path)) {
        at = event.other + at.substr(event.path.size());
      } else if (follows && event.kind != "seen" && within(at, taken)) {
        at = event.kept.empty() ? "" : event.kept + at.substr(taken.size()), follows = false;
      }
    }
    return at;
  }

  // A directory of empty files with the names that this node sees in one.
  std::string view(const std::string& path, const std::string& real, DIR* (*open)(const char*)) {
    std::set<std::string> names;
    lookup(path, &names);
    if (names.empty()) return real;
    DIR* listed = open(real.c_str());
    if (!listed) return real;
    while (dirent* entry = readdir(listed)) names.insert(entry->d_name);
    closedir(listed);
    names.erase("."), names.erase("..");
    std::string shown = place_ + "/view-" + std::to_string(getpid()) + "-" + std::to_string(++views);
    syscall(SYS_mkdirat, AT_FDCWD, shown.c_str(), 0777);
    for (const std::string& name : names) {
      std::string target = lookup(path + "/" + name), sign = shown + "/" + name;
      struct stat found;
      if (target.empty() || syscall(SYS_newfstatat, AT_FDCWD, target.c_str(), &found, AT_SYMLINK_NOFOLLOW) != 0) continue;
      if (S_ISDIR(found.st_mode)) syscall(SYS_mkdirat, AT_FDCWD, sign.c_str(), 0777);
      else if (S_ISLNK(found.st_mode)) syscall(SYS_symlinkat, "of another name", AT_FDCWD, sign.c_str());
      else syscall(SYS_mknodat, AT_FDCWD, sign.c_str(), S_IFREG | 0666, 0);
    }
    return shown;
  }

 private:
  void read() {
    char buffer[65536];
    for (ssize_t size; (size = syscall(SYS_pread64, file_, buffer, sizeof buffer, known)) > 0; known += size) {
      unread.append(buffer, size);
      for (size_t end; (end = unread.find('\n')) != std::string::npos; unread.erase(0, end + 1)) {
        std::vector<std::string> parts{""};
        for (char letter : unread.substr(0, end)) {
          if (letter == '\t') parts.emplace_back();
          else parts.back().push_back(letter);
        }
        if (parts.size() == 6) events.push_back({atof(parts[0].c_str()), parts[1], parts[2], parts[3], parts[4], parts[5]});
      }
    }
  }

  std::string place_;
  int file_ = -1;
};

// Calls a function with the path that a name of this node's view lies under.
template <typename Result, typename Function>
Result looked_up(Count kind, const std::string& given, const char* path, Result failure, Function call) {
  add(kind, given);
  if (!is_shared(given)) return call(path);
  Journal journal(LOCK_SH);
  if (!journal.active()) return call(path);
  std::string real = journal.lookup(normal(given));
  if (real.empty()) {
    errno = ENOENT;
    return failure;
  }
  return call(real == normal(given) ? path : real.c_str());
}

// Makes a change and writes it down.
template <typename Function>
int changed(const char* kind, const std::string& given, Function call, const std::string& other = "", bool takes = false) {
  bool shared = is_shared(given) || (!other.empty() && is_shared(other));
  if (!shared) return call();
  double pause = strcmp(kind, "rename") ? 0 : atof(setting("SHARED_RENAME").c_str()) / 2;
  usleep(pause * 1e6);
  int result;
  {
    Journal journal(LOCK_EX);
    if (!journal.active()) return call();
    std::string path = normal(given), to = other.empty() ? "" : normal(other);
    std::string kept = takes ? journal.keep(to.empty() ? path : to) : "";
    result = call();
    if (result == 0) journal.write(kind, path, to, kept);
    else if (errno == EEXIST || errno == ENOTEMPTY) journal.write("seen", to.empty() ? path : to);  // the server has said so
  }
  int error = errno;
  usleep(pause * 1e6);
  errno = error;
  return result;
}

}  // namespace

// What this process has opened, looked up, listed, read and mapped (the last two in bytes), below the directory and elsewhere;
// and what it told the store.
extern "C" void shared_counts(long* values) {
  for (int where = 0; where < 2; ++where) for (int kind = 0; kind < KINDS; ++kind) *values++ = counts[where][kind];
  *values = messages;
}

extern "C" ssize_t send(int socket, const void* data, size_t size, int flags) {
  static auto real = next<ssize_t (*)(int, const void*, size_t, int)>("send");
  sockaddr_storage peer;
  socklen_t room = sizeof peer;
  if (getpeername(socket, reinterpret_cast<sockaddr*>(&peer), &room) == 0) {
    in_port_t port = peer.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6&>(peer).sin6_port
                     : peer.ss_family == AF_INET ? reinterpret_cast<sockaddr_in&>(peer).sin_port : 0;
    messages += port && ntohs(port) == atoi(setting("MASTER_PORT").c_str());
  }
  return real(socket, data, size, flags);
}

#define LOOKS(type, failure, kind, name, at, parameters, arguments)                                                    \
  extern "C" type name parameters {                                                                                    \
    static auto real = next<type(*) parameters>(#name);                                                                \
    return looked_up<type>(kind, path_at(at, path), path, failure, [&](const char* path) { return real arguments; }); \
  }

LOOKS(int, -1, LOOKED_UP, stat, AT_FDCWD, (const char* path, struct stat* found), (path, found))
LOOKS(int, -1, LOOKED_UP, stat64, AT_FDCWD, (const char* path, struct stat64* found), (path, found))
LOOKS(int, -1, LOOKED_UP, lstat, AT_FDCWD, (const char* path, struct stat* found), (path, found))
LOOKS(int, -1, LOOKED_UP, lstat64, AT_FDCWD, (const char* path, struct stat64* found), (path, found))
LOOKS(int, -1, LOOKED_UP, __xstat64, AT_FDCWD, (int version, const char* path, struct stat64* found), (version, path, found))
LOOKS(int, -1, LOOKED_UP, __lxstat64, AT_FDCWD, (int version, const char* path, struct stat64* found), (version, path, found))
LOOKS(int, -1, LOOKED_UP, fstatat, from, (int from, const char* path, struct stat* found, int flags),
      (from, path, found, flags))
LOOKS(int, -1, LOOKED_UP, fstatat64, from, (int from, const char* path, struct stat64* found, int flags),
      (from, path, found, flags))
LOOKS(int, -1, LOOKED_UP, statx, from, (int from, const char* path, int flags, unsigned mask, struct statx* found),
      (from, path, flags, mask, found))
LOOKS(int, -1, LOOKED_UP, access, AT_FDCWD, (const char* path, int mode), (path, mode))
LOOKS(int, -1, LOOKED_UP, faccessat, from, (int from, const char* path, int mode, int flags), (from, path, mode, flags))
LOOKS(ssize_t, -1, LOOKED_UP, readlink, AT_FDCWD, (const char* path, char* target, size_t size), (path, target, size))
LOOKS(ssize_t, -1, LOOKED_UP, readlinkat, from, (int from, const char* path, char* target, size_t size),
      (from, path, target, size))

extern "C" DIR* opendir(const char* path) {
  static auto real = next<DIR* (*)(const char*)>("opendir");
  std::string given = path_at(AT_FDCWD, path);
  return looked_up<DIR*>(LISTED, given, path, nullptr, [&](const char* path) {
    Journal journal(LOCK_SH);
    return real(journal.active() && is_shared(given) ? journal.view(normal(given), path, real).c_str() : path);
  });
}

// Opening for reading looks a path up; what creates goes to the server, which knows what there is.
#define OPENS(name, at, parameters, arguments)                                                                      \
  extern "C" int name parameters {                                                                                  \
    MODE_GIVEN_WITH(flags)                                                                                          \
    static auto real = next<int (*) parameters>(#name);                                                             \
    std::string given = path_at(at, path);                                                                          \
    if (!(flags & O_CREAT) || !is_shared(given))                                                                    \
      return looked_up<int>(OPENED, given, path, -1, [&](const char* path) { return real arguments; });             \
    add(OPENED, given);                                                                                             \
    int file = -1;                                                                                                  \
    bool there = exists(given);                                                                                     \
    changed(there ? "seen" : "create", given, [&] { return (file = real arguments) < 0 ? -1 : 0; });                \
    return file;                                                                                                    \
  }

EVERY_OPEN(OPENS)

#define FOPENS(name)                                                                                    \
  extern "C" FILE* name(const char* path, const char* mode) {                                          \
    static auto real = next<FILE* (*)(const char*, const char*)>(#name);                               \
    if (mode[0] != 'r') return real(path, mode);                                                       \
    auto call = [&](const char* path) { return real(path, mode); };                                    \
    return looked_up<FILE*>(OPENED, path_at(AT_FDCWD, path), path, nullptr, call);                     \
  }

FOPENS(fopen)
FOPENS(fopen64)

#define CHANGES(name, kind, path, takes, parameters, arguments)                          \
  extern "C" int name parameters {                                                       \
    static auto real = next<int(*) parameters>(#name);                                   \
    return changed(kind, path, [&] { return real arguments; }, "", takes);              \
  }

CHANGES(mkdir, "create", path_at(AT_FDCWD, path), false, (const char* path, mode_t mode), (path, mode))
CHANGES(mkdirat, "create", path_at(at, path), false, (int at, const char* path, mode_t mode), (at, path, mode))
CHANGES(rmdir, "remove", path_at(AT_FDCWD, path), true, (const char* path), (path))
CHANGES(unlink, "remove", path_at(AT_FDCWD, path), true, (const char* path), (path))
CHANGES(unlinkat, "remove", path_at(at, path), true, (int at, const char* path, int flags), (at, path, flags))
CHANGES(symlink, "create", path_at(AT_FDCWD, path), false, (const char* to, const char* path), (to, path))
CHANGES(link, "create", path_at(AT_FDCWD, path), false, (const char* from, const char* path), (from, path))
CHANGES(linkat, "create", path_at(at, path), false, (int of, const char* from, int at, const char* path, int flags),
        (of, from, at, path, flags))

#define RENAMES(name, from, to, parameters, arguments)                                     \
  extern "C" int name parameters {                                                         \
    static auto real = next<int(*) parameters>(#name);                                     \
    return changed("rename", from, [&] { return real arguments; }, to, true);             \
  }

RENAMES(rename, path_at(AT_FDCWD, a), path_at(AT_FDCWD, b), (const char* a, const char* b), (a, b))
RENAMES(renameat, path_at(f, a), path_at(t, b), (int f, const char* a, int t, const char* b), (f, a, t, b))
RENAMES(renameat2, path_at(f, a), path_at(t, b), (int f, const char* a, int t, const char* b, unsigned x), (f, a, t, b, x))

#define READS(name, parameters, arguments)                   \
  extern "C" ssize_t name parameters {                       \
    static auto real = next<ssize_t(*) parameters>(#name);   \
    ssize_t taken = real arguments;                          \
    int error = errno;                                       \
    if (taken > 0) add(READ, path_of(file), taken);          \
    errno = error;                                           \
    return taken;                                            \
  }

READS(read, (int file, void* data, size_t size), (file, data, size))
READS(readv, (int file, const iovec* data, int parts), (file, data, parts))
READS(pread, (int file, void* data, size_t size, off_t at), (file, data, size, at))
READS(pread64, (int file, void* data, size_t size, off64_t at), (file, data, size, at))
READS(preadv, (int file, const iovec* data, int parts, off_t at), (file, data, parts, at))
READS(preadv64, (int file, const iovec* data, int parts, off64_t at), (file, data, parts, at))
READS(preadv2, (int file, const iovec* data, int parts, off_t at, int flags), (file, data, parts, at, flags))
READS(preadv64v2, (int file, const iovec* data, int parts, off64_t at, int flags), (file, data, parts, at, flags))

#define MAPS(name, offset)                                                                              \
  extern "C" void* name(void* at, size_t size, int protection, int flags, int file, offset start) {     \
    void* place = reinterpret_cast<void*>(syscall(SYS_mmap, at, size, protection, flags, file, start)); \
    if (file >= 0 && !(flags & MAP_ANONYMOUS) && place != MAP_FAILED) {                                 \
      struct stat found;                                                                                \
      if (fstat(file, &found) == 0 && S_ISREG(found.st_mode) && found.st_size > start)                  \
        add(MAPPED, path_of(file), std::min<long>(size, found.st_size - start));                        \
    }                                                                                                   \
    return place;                                                                                       \
  }

MAPS(mmap, off_t)
MAPS(mmap64, off64_t)

// A node's byte ranges lie where no other node's do.
#define LOCKS(name)                                                                                        \
  extern "C" int name(int file, int command, ...) {                                                        \
    va_list rest;                                                                                          \
    va_start(rest, command);                                                                               \
    void* argument = va_arg(rest, void*);                                                                  \
    va_end(rest);                                                                                          \
    static auto real = next<int (*)(int, int, ...)>(#name);                                                \
    bool locks = false;                                                                                    \
    for (int one : {F_GETLK, F_SETLK, F_SETLKW, F_OFD_GETLK, F_OFD_SETLK, F_OFD_SETLKW}) locks |= one == command; \
    std::string how = locks ? setting("SHARED_LOCKS") : "";                                                \
    if (how.empty() || !is_shared(path_of(file))) return real(file, command, argument);                    \
    if (how == "none") return errno = ENOLCK, -1;                                                          \
    auto* range = static_cast<struct flock*>(argument);                                                    \
    struct flock shifted = *range;                                                                         \
    const off_t room = off_t{1} << 44;                                                                     \
    shifted.l_start += room * (1 + std::hash<std::string>()(setting("SHARED_NODE")) % 65521);              \
    if (shifted.l_len == 0) shifted.l_len = room - range->l_start;                                         \
    int result = real(file, command, &shifted);                                                            \
    range->l_type = shifted.l_type, range->l_pid = shifted.l_pid;                                          \
    return result;                                                                                         \
  }

LOCKS(fcntl)
LOCKS(fcntl64)

extern "C" int flock(int file, int operation) noexcept {
  static auto real = next<int (*)(int, int)>("flock");
  if (setting("SHARED_LOCKS") == "none" && is_shared(path_of(file))) return errno = ENOLCK, -1;
  return real(file, operation);
}
