#include "cuda/device_region.h"

#include <gtest/gtest.h>

#include <stdexcept>
#include <string>
#include <thread>

#include "cuda/fake_cuda.h"

namespace ktrt {
namespace {

using testing::FakeCuda;

constexpr std::size_t kGranule = std::size_t{1} << 16;  // the stand-in's

template <class F>
std::string message_of(F&& call) {
  try {
    call();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

class DeviceRegionTest : public ::testing::Test {
 protected:
  unsigned char* bytes_of(const DeviceRegion& region) {
    return reinterpret_cast<unsigned char*>(region.address());
  }

  FakeCuda cuda;
};

TEST_F(DeviceRegionTest, HoldsWhatIsCommitted) {
  DeviceRegion region(10 * kGranule - 5, cuda.path());
  EXPECT_EQ(region.bytes(), 10 * kGranule);
  EXPECT_EQ(region.granularity(), kGranule);
  EXPECT_EQ(cuda.granules(), 0);
  EXPECT_EQ(region.commit(kGranule + 1, 2 * kGranule + 1), 2 * kGranule);
  EXPECT_EQ(region.commit(kGranule, 3 * kGranule), 0u) << "they have memory";
  EXPECT_EQ(region.commit(0, 4 * kGranule), 2 * kGranule) << "both sides of it";
  EXPECT_EQ(region.commit(7, 7), 0u);
  EXPECT_EQ(region.committed_bytes(), 4 * kGranule);
  EXPECT_EQ(cuda.granules(), 4);
  bytes_of(region)[0] = 1;
  bytes_of(region)[4 * kGranule - 1] = 2;
}

TEST_F(DeviceRegionTest, GivesWholeGranulesBack) {
  DeviceRegion region(8 * kGranule, cuda.path());
  region.commit(0, 8 * kGranule);
  bytes_of(region)[kGranule - 1] = 3;
  EXPECT_EQ(region.decommit(kGranule - 1, 3 * kGranule - 1), kGranule);
  EXPECT_EQ(cuda.granules(), 7);
  EXPECT_EQ(bytes_of(region)[kGranule - 1], 3);
  EXPECT_EQ(region.decommit(0, 8 * kGranule), 7 * kGranule);
  EXPECT_EQ(region.decommit(0, 8 * kGranule), 0u);
  EXPECT_EQ(region.decommit(5, 6), 0u) << "no whole one";
  EXPECT_EQ(region.commit(0, 1), kGranule);
  EXPECT_EQ(bytes_of(region)[kGranule - 1], 0) << "other memory";
}

TEST_F(DeviceRegionTest, TakesNothingWithIt) {
  { DeviceRegion region(4 * kGranule, cuda.path()); }
  {
    DeviceRegion region(4 * kGranule, cuda.path());
    region.commit(0, 2 * kGranule);
    region.commit(3 * kGranule, 4 * kGranule);
  }
  EXPECT_EQ(cuda.granules(), 0);
}

TEST_F(DeviceRegionTest, ACommitThatFailsChangesNothing) {
  DeviceRegion region(8 * kGranule, cuda.path());
  region.commit(2 * kGranule, 3 * kGranule);
  cuda.set("granules", 4);
  EXPECT_EQ(message_of([&] { region.commit(0, 8 * kGranule); }),
            "cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY (2, as the test asked)");
  for (const char* function : {"cuMemMap", "cuMemSetAccess"}) {
    cuda.fail(function, 2, 1);
    EXPECT_NE(message_of([&] { region.commit(1 * kGranule, 4 * kGranule); }).find(function),
              std::string::npos);
  }
  EXPECT_EQ(region.committed_bytes(), kGranule);
  EXPECT_EQ(cuda.granules(), 1);
  EXPECT_EQ(region.commit(0, 4 * kGranule), 3 * kGranule);
}

TEST_F(DeviceRegionTest, AnyThreadCommits) {
  DeviceRegion region(4 * kGranule, cuda.path());
  std::thread([&] { EXPECT_EQ(region.commit(0, 1), kGranule); }).join();
  std::thread([&] { EXPECT_EQ(region.decommit(0, kGranule), kGranule); }).join();
}

TEST_F(DeviceRegionTest, NamesWhatIsMissing) {
  const auto open = [&] { DeviceRegion(kGranule, cuda.path()); };
  cuda.fail("cuMemAddressReserve", 1, 2);
  EXPECT_NE(message_of(open).find("cuMemAddressReserve: CUDA_ERROR_OUT_OF_MEMORY"),
            std::string::npos);
  cuda.set("virtual_memory", 0);
  EXPECT_NE(message_of(open).find("no virtual memory management"), std::string::npos);
  cuda.make_current(false);
  EXPECT_NE(message_of(open).find("no current CUDA context"), std::string::npos);
  EXPECT_NE(message_of([] { DeviceRegion(1, "/no/such.so"); }).find("/no/such.so"),
            std::string::npos);
}

TEST_F(DeviceRegionTest, RangesAreChecked) {
  DeviceRegion region(2 * kGranule, cuda.path());
  EXPECT_THROW(region.commit(0, 2 * kGranule + 1), std::invalid_argument);
  EXPECT_THROW(region.commit(2, 1), std::invalid_argument);
  EXPECT_THROW(region.decommit(0, 3 * kGranule), std::invalid_argument);
  EXPECT_THROW(DeviceRegion(0, cuda.path()), std::invalid_argument);
}

}  // namespace
}  // namespace ktrt
