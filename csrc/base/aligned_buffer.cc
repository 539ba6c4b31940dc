#include "base/aligned_buffer.h"

#include <sys/mman.h>

#include <new>

namespace ktrt {

namespace {
constexpr std::size_t kHugePage = std::size_t{2} << 20;
}

AlignedBuffer::AlignedBuffer(std::size_t bytes) {
  if (bytes == 0) return;
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
  // A 2 MB page saves the page walk that a decode step takes every 4 KB; refusal is harmless.
  if (bytes >= kHugePage) madvise(data, bytes, MADV_HUGEPAGE);
  data_ = data;
  bytes_ = bytes;
}

void AlignedBuffer::reset() noexcept {
  if (data_ != nullptr) munmap(data_, bytes_);
  data_ = nullptr;
  bytes_ = 0;
}

}  // namespace ktrt
