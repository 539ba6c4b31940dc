// A whole file, read-only, in memory; and the other way round.
#pragma once

#include <cstddef>
#include <string>
#include <utility>

namespace ktrt {

// Shared with every process that maps the file: its pages are the page cache's own. Starts at a
// multiple of 2 MB and asks for huge pages, which Linux 6.16 gives on ext4 (xfs and btrfs earlier).
class MappedFile {
 public:
  MappedFile() = default;
  // `fd` may be closed afterwards. Throws std::system_error.
  explicit MappedFile(int fd);
  ~MappedFile() { reset(); }
  MappedFile(MappedFile&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  MappedFile& operator=(MappedFile&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  void reset() noexcept;
  std::size_t bytes() const { return bytes_; }
  bool empty() const { return bytes_ == 0; }
  std::byte* data() const { return static_cast<std::byte*>(data_); }

  // Bytes that lie in huge pages now; pages that were never read do not count.
  std::size_t huge_bytes() const;

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

// Gives the physical memory of this process's mappings of a file back, wherever they were made;
// what is read again comes from the page cache or the disk. Mappings that were written to stay.
// `path`: as the kernel knows it, without symbolic links. Returns how many mappings were released.
int release_pages_of(const std::string& path);

// Appends to `fd`, in pieces that the page cache can keep in huge pages. Throws std::system_error.
void write_all(int fd, const std::byte* data, std::size_t bytes);

}  // namespace ktrt
