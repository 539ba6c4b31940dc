// Zero-initialised memory straight from the kernel, with huge pages requested where it is large.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

namespace ktrt {

// Anonymous mapping: page-aligned (so 64-byte aligned too), zero until written, first touched by
// the thread that writes it. Throws std::bad_alloc.
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(std::size_t bytes);
  ~AlignedBuffer() { reset(); }
  AlignedBuffer(AlignedBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;

  void reset() noexcept;
  std::size_t bytes() const { return bytes_; }
  bool empty() const { return bytes_ == 0; }
  // Bytes of its pages, which it shares with nobody.
  std::size_t page_bytes() const;

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

inline constexpr std::size_t kCacheLine = 64;

// Smallest multiple of `unit` that is at least `value`.
template <class T>
constexpr T round_up(T value, T unit) {
  return (value + unit - 1) / unit * unit;
}

}  // namespace ktrt
