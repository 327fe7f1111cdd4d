// Gathers rows of latent shards into one buffer with positioned reads.
//
// Rows of a batch lie at random places of many files. Reading them one after the other would cost the latency of each, so the
// kernel is told of all of them first (`advise_rows`) and fetches them side by side; the copies into the (pinned) batch then find
// them there.
// Large batches are copied by several threads.

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <fcntl.h>
#include <thread>
#include <unistd.h>
#include <vector>

namespace {

// Below this many bytes per thread, starting the thread costs more than it saves (benchmarks/data/reader.py).
constexpr int64_t kBytesPerThread = 8 << 20;

// Reads exactly `size` bytes at `offset`; returns 0, or the error number, with EIO for a file that ends early.
int read_fully(int file, char* target, int64_t size, int64_t offset) {
  while (size > 0) {
    const ssize_t count = pread(file, target, static_cast<size_t>(size), offset);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return errno;
    if (count == 0) return EIO;
    target += count;
    size -= count;
    offset += count;
  }
  return 0;
}

}  // namespace

// Tells the kernel of rows that will be read. Only advice: where it is not taken, reading waits instead.
extern "C" void advise_rows(const int32_t* files, const int64_t* offsets, int64_t count, int64_t row_bytes) {
  for (int64_t row = 0; row < count; ++row) (void)posix_fadvise(files[row], offsets[row], row_bytes, POSIX_FADV_WILLNEED);
}

using Hash = uint64_t (*)(const void*, size_t);

// Reads `count` rows of `row_bytes` bytes: row i from files[i] at offsets[i] to target + i * row_bytes. Where there is a hash,
// sums[i] is that of row i, computed while the row lies in the processor's cache.
// Returns -1 when all is well, else the number of a row that could not be read; its error number is left in *error.
extern "C" int64_t gather_rows(const int32_t* files, const int64_t* offsets, int64_t count, int64_t row_bytes, char* target,
                               int32_t max_threads, Hash hash, uint64_t* sums, int32_t* error) {
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> failed{-1};
  std::atomic<int32_t> failure{0};
  const auto work = [&] {
    for (int64_t row = next++; row < count && failed.load() < 0; row = next++) {
      const int result = read_fully(files[row], target + row * row_bytes, row_bytes, offsets[row]);
      if (result != 0) {
        failure = result;
        failed = row;
      } else if (hash != nullptr) {
        sums[row] = hash(target + row * row_bytes, static_cast<size_t>(row_bytes));
      }
    }
  };
  const int64_t useful = std::min({count, count * row_bytes / kBytesPerThread + 1, static_cast<int64_t>(max_threads)});
  std::vector<std::thread> threads;
  for (int64_t number = 1; number < useful; ++number) threads.emplace_back(work);
  work();
  for (auto& thread : threads) thread.join();
  *error = failure;
  return failed;
}
