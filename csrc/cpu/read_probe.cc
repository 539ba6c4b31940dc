#include "cpu/read_probe.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>

#include "base/check.h"

namespace ktrt {

namespace {

// Eight independent sums, so that the loop waits for memory and not for its own additions.
std::uint64_t sum_words(const std::uint64_t* words, std::size_t count) {
  std::uint64_t sums[8] = {};
  for (std::size_t i = 0; i + 8 <= count; i += 8) {
    for (std::size_t lane = 0; lane < 8; ++lane) sums[lane] += words[i + lane];
  }
  std::uint64_t total = 0;
  for (const std::uint64_t sum : sums) total += sum;
  return total;
}

}  // namespace

ReadProbe::ReadProbe(std::size_t bytes) : memory_(round_up(bytes, kCacheLine)) {
  KTRT_CHECK(bytes > 0, "a read probe of 0 bytes measures nothing");
}

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
