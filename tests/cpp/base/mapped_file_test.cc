#include "base/mapped_file.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

namespace ktrt {
namespace {

class TemporaryFile {
 public:
  TemporaryFile() : fd_(mkstemp(name_.data())) {}
  ~TemporaryFile() {
    close(fd_);
    unlink(name_.c_str());
  }
  int fd() const { return fd_; }
  const std::string& name() const { return name_; }

 private:
  std::string name_ = "/tmp/ktrt_mapped_XXXXXX";
  int fd_;
};

TEST(MappedFile, HoldsWhatWasWritten) {
  const TemporaryFile file;
  std::vector<std::byte> bytes(5000000);
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>(i * 7 >> 3);
  write_all(file.fd(), bytes.data(), bytes.size());
  MappedFile first(file.fd());
  ASSERT_EQ(first.bytes(), bytes.size());
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(first.data()) % (std::size_t{2} << 20), 0u);
  EXPECT_EQ(std::memcmp(first.data(), bytes.data(), bytes.size()), 0);
  EXPECT_LE(first.huge_bytes(), first.bytes());
  const MappedFile second(std::move(first));
  EXPECT_TRUE(first.empty());  // NOLINT: moved from, on purpose
  EXPECT_EQ(std::memcmp(second.data(), bytes.data(), bytes.size()), 0);
  EXPECT_EQ(MappedFile().huge_bytes(), 0u);
}

TEST(MappedFile, SurvivesReplacementOfTheFile) {
  TemporaryFile file;
  write_all(file.fd(), reinterpret_cast<const std::byte*>("abcd"), 4);
  const MappedFile mapped(file.fd());
  unlink(file.name().c_str());
  EXPECT_EQ(std::memcmp(mapped.data(), "abcd", 4), 0);
}

TEST(MappedFile, EmptyAndBadFiles) {
  const TemporaryFile file;
  EXPECT_TRUE(MappedFile(file.fd()).empty());
  EXPECT_THROW(MappedFile(-1), std::system_error);
  EXPECT_THROW(write_all(-1, reinterpret_cast<const std::byte*>("a"), 1), std::system_error);
  const int full = open("/dev/full", O_WRONLY);
  ASSERT_GE(full, 0);
  try {
    write_all(full, reinterpret_cast<const std::byte*>("a"), 1);
    FAIL() << "expected ENOSPC";
  } catch (const std::system_error& error) {
    EXPECT_EQ(error.code().value(), ENOSPC);
  }
  close(full);
}

// Resident pages of a range.
std::size_t resident(void* data, std::size_t bytes) {
  FILE* file = fopen("/proc/self/smaps", "r");
  char line[512];
  char start[32];
  snprintf(start, sizeof start, "%lx-", reinterpret_cast<unsigned long>(data));
  bool inside = false;
  unsigned long rss = 0;
  while (fgets(line, sizeof line, file) != nullptr) {
    if (strncmp(line, start, strlen(start)) == 0) inside = true;
    if (inside && sscanf(line, "Rss: %lu", &rss) == 1) break;
  }
  fclose(file);
  EXPECT_LE(rss, bytes);
  return rss * 1024;
}

TEST(ReleasePages, GivesBackCleanMappingsAndKeepsWrittenOnes) {
  const TemporaryFile file;
  constexpr std::size_t kBytes = 1 << 20;
  const std::vector<std::byte> bytes(kBytes, std::byte{7});
  write_all(file.fd(), bytes.data(), kBytes);
  auto* written =
      static_cast<char*>(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, file.fd(), 0));
  ASSERT_NE(written, MAP_FAILED);
  const TemporaryFile other;
  write_all(other.fd(), bytes.data(), kBytes);
  written[5] = 9;
  const MappedFile clean(other.fd());
  int sum = 0;
  for (std::size_t i = 0; i < kBytes; i += 4096) sum += static_cast<int>(clean.data()[i]);
  EXPECT_EQ(sum, 7 * 256);
  EXPECT_GT(resident(clean.data(), kBytes), 0u);
  EXPECT_EQ(release_pages_of(other.name()), 1);
  EXPECT_EQ(resident(clean.data(), kBytes), 0u);
  EXPECT_EQ(clean.data()[4096], std::byte{7});
  EXPECT_EQ(release_pages_of(file.name()), 0);
  EXPECT_EQ(written[5], 9);
  EXPECT_EQ(release_pages_of("/no/such/file"), 0);
  munmap(written, kBytes);
}

}  // namespace
}  // namespace ktrt
