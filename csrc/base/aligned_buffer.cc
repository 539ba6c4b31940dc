#include "base/aligned_buffer.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <new>

namespace ktrt {

namespace {

#ifdef __SANITIZE_ADDRESS__

// AddressSanitizer watches the ends of heap blocks, not of mappings.
void* allocate(std::size_t bytes) {
  void* data = nullptr;
  if (posix_memalign(&data, kCacheLine, bytes) != 0) throw std::bad_alloc();
  return std::memset(data, 0, bytes);
}

void release(void* data, std::size_t) { std::free(data); }

#else

constexpr std::size_t kHugePage = std::size_t{2} << 20;

void* allocate(std::size_t bytes) {
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
  // A 2 MB page saves the page walk that a decode step takes every 4 KB; refusal is harmless.
  if (bytes >= kHugePage) madvise(data, bytes, MADV_HUGEPAGE);
  return data;
}

void release(void* data, std::size_t bytes) { munmap(data, bytes); }

#endif

}  // namespace

std::size_t AlignedBuffer::page_bytes() const {
  static const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return round_up(bytes_, page);
}

AlignedBuffer::AlignedBuffer(std::size_t bytes) {
  if (bytes == 0) return;
  data_ = allocate(bytes);
  bytes_ = bytes;
}

void AlignedBuffer::reset() noexcept {
  if (data_ != nullptr) release(data_, bytes_);
  data_ = nullptr;
  bytes_ = 0;
}

}  // namespace ktrt
