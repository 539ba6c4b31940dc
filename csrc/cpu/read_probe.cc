#include "cpu/read_probe.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>

#include "base/address_range.h"
#include "base/check.h"

namespace ktrt {

namespace {

// A core reads the most when it goes from stream to stream: the hardware prefetches each of them,
// and so has more lines under way (kernels/side_by_side.h). Eight gave 28 to 30 GB/s where one
// gave 23.5.
constexpr std::size_t kStreams = 8;
constexpr std::size_t kBurstWords = 256 / sizeof(std::uint64_t);

// Eight independent sums, so that the loop waits for memory and not for its own additions.
std::uint64_t sum_words(const std::uint64_t* words, std::size_t count) {
  std::uint64_t sums[8] = {};
  const auto add = [&](const std::uint64_t* burst, std::size_t size) {
    for (std::size_t i = 0; i + 8 <= size; i += 8) {
      for (std::size_t lane = 0; lane < 8; ++lane) sums[lane] += burst[i + lane];
    }
  };
  const std::size_t stream = count / kStreams / kBurstWords * kBurstWords;
  for (std::size_t at = 0; at < stream; at += kBurstWords) {
    for (std::size_t s = 0; s < kStreams; ++s) add(words + s * stream + at, kBurstWords);
  }
  add(words + kStreams * stream, count - kStreams * stream);
  std::uint64_t total = 0;
  for (const std::uint64_t sum : sums) total += sum;
  return total;
}

std::size_t checked(std::size_t bytes) {
  KTRT_CHECK(bytes > 0, "a read probe of 0 bytes measures nothing");
  // Rounded up to lines it must still be a size.
  KTRT_CHECK(bytes <= kAddressEnd, "a read probe of " << bytes << " bytes does not fit into the "
                                                      << "addresses of a process");
  return bytes;
}

}  // namespace

ReadProbe::ReadProbe(std::size_t bytes) : memory_(round_up(checked(bytes), kCacheLine)) {}

double ReadProbe::run(ThreadPool& pool) const {
  const std::size_t words = memory_.bytes() / sizeof(std::uint64_t);
  const auto threads = static_cast<std::size_t>(pool.size());
  std::atomic<std::uint64_t> sink{0};  // the sums must not be optimised away
  const auto part = [&](int thread) { return words * static_cast<std::size_t>(thread) / threads; };
  // Untouched pages would all be the one zero page, which stays in the cache. Whoever is to read a
  // page writes it first, so that it lies on the reader's NUMA node.
  if (*memory_.as<std::uint64_t>() == 0) {
    pool.run([&](int thread) {
      const std::size_t begin = part(thread);
      std::memset(memory_.as<std::uint64_t>() + begin, 1, 8 * (part(thread + 1) - begin));
    });
  }
  const auto start = std::chrono::steady_clock::now();
  pool.run([&](int thread) {
    const std::size_t begin = part(thread);
    sink.fetch_add(sum_words(memory_.as<std::uint64_t>() + begin, part(thread + 1) - begin),
                   std::memory_order_relaxed);
  });
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace ktrt
