#include "base/mapped_file.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <string>
#include <system_error>

#include "base/aligned_buffer.h"

namespace ktrt {

namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kWriteBytes = 4 * kHugePage;

[[noreturn]] void fail(const char* what) {
  throw std::system_error(errno, std::generic_category(), what);
}

// Reserves addresses with room to choose a multiple of 2 MB, maps there, and returns the rest.
void* map_aligned(int fd, std::size_t bytes) {
  const std::size_t reserved = round_up(bytes, std::size_t{4096}) + kHugePage;
  void* room =
      mmap(nullptr, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (room == MAP_FAILED) fail("mmap");
  const auto begin = reinterpret_cast<std::uintptr_t>(room);
  const std::uintptr_t start = round_up(begin, std::uintptr_t{kHugePage});
  const std::uintptr_t end = start + round_up(bytes, std::size_t{4096});
  void* data =
      mmap(reinterpret_cast<void*>(start), bytes, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0);
  if (data == MAP_FAILED) {
    const int error = errno;
    munmap(room, reserved);
    errno = error;
    fail("mmap");
  }
  if (start > begin) munmap(room, start - begin);
  if (begin + reserved > end) munmap(reinterpret_cast<void*>(end), begin + reserved - end);
  return data;
}

}  // namespace

MappedFile::MappedFile(int fd) {
  struct stat status {};
  if (fstat(fd, &status) != 0) fail("fstat");
  if (status.st_size == 0) return;
  const auto bytes = static_cast<std::size_t>(status.st_size);
  data_ = map_aligned(fd, bytes);
  bytes_ = bytes;
  // Refusals are harmless.
  madvise(data_, bytes_, MADV_HUGEPAGE);
}

void MappedFile::reset() noexcept {
  if (data_ != nullptr) munmap(data_, bytes_);
  data_ = nullptr;
  bytes_ = 0;
}

std::size_t MappedFile::huge_bytes() const {
  std::ifstream file("/proc/self/smaps");
  char start[32];
  std::snprintf(start, sizeof start, "%lx-", reinterpret_cast<unsigned long>(data_));
  bool inside = false;
  for (std::string line; std::getline(file, line);) {
    inside = inside || line.starts_with(start);
    if (inside && line.starts_with("FilePmdMapped:")) {
      return std::stoull(line.substr(sizeof "FilePmdMapped:")) * 1024;
    }
    if (inside && line.starts_with("VmFlags:")) break;
  }
  return 0;
}

int release_pages_of(const std::string& path) {
  std::ifstream file("/proc/self/smaps");
  std::uintptr_t begin = 0;
  std::uintptr_t end = 0;
  int mappings = 0;
  for (std::string line; std::getline(file, line);) {
    if (line.ends_with(" " + path)) {
      std::size_t dash = 0;
      begin = std::stoull(line, &dash, 16);
      end = std::stoull(line.substr(dash + 1), nullptr, 16);
    } else if (end != 0 && line.starts_with("Anonymous:")) {
      // Pages that were written to are the process's own, and would be lost.
      if (std::stoull(line.substr(sizeof "Anonymous:")) == 0) {
        madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
        ++mappings;
      }
      end = 0;
    }
  }
  return mappings;
}

void write_all(int fd, const std::byte* data, std::size_t bytes) {
  while (bytes > 0) {
    const ssize_t written = write(fd, data, std::min(bytes, kWriteBytes));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail("write");
    data += written;
    bytes -= static_cast<std::size_t>(written);
  }
}

}  // namespace ktrt
