#include "cuda/cuda_driver.h"

#include <gtest/gtest.h>

#include <stdexcept>
#include <string>
#include <thread>

#include "cuda/fake_cuda.h"

namespace ktrt {
namespace {

using testing::FakeCuda;

std::string message_of_opening(const std::string& path) {
  try {
    const CudaDriver driver(path);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

TEST(CudaDriver, OpensWhatIsThere) {
  FakeCuda cuda;
  const CudaDriver driver(cuda.path());
  EXPECT_NE(driver.context(), nullptr);
  EXPECT_NE(driver.api().stream_wait_value32, nullptr);
  EXPECT_EQ(driver.device_attribute(kCuCanUseStreamMemOps), 1);
}

TEST(CudaDriver, AMissingLibraryIsNamed) {
  const std::string message = message_of_opening("/no/such/libcuda.so.1");
  EXPECT_NE(message.find("/no/such/libcuda.so.1 cannot be opened"), std::string::npos) << message;
}

TEST(CudaDriver, AMissingEntryPointIsNamed) {
  FakeCuda cuda(FAKE_CUDA_LIBRARY);
  const std::string message = message_of_opening(FAKE_CUDA_WITHOUT_QUERY_LIBRARY);
  EXPECT_NE(message.find("has no cuStreamQuery"), std::string::npos) << message;
}

TEST(CudaDriver, MissingStreamMemoryOperationsAreNoError) {
  FakeCuda cuda(FAKE_CUDA_WITHOUT_MEMORY_OPS_LIBRARY);
  const CudaDriver driver(cuda.path());
  EXPECT_EQ(driver.api().stream_write_value32, nullptr);
  EXPECT_EQ(driver.api().stream_wait_value32, nullptr);
}

TEST(CudaDriver, AnOldDriverIsRefused) {
  FakeCuda cuda;
  cuda.set("version", 11080);
  const std::string message = message_of_opening(cuda.path());
  EXPECT_NE(message.find("supports CUDA 11.8, at least 12.0"), std::string::npos) << message;
}

TEST(CudaDriver, NeedsACurrentContext) {
  FakeCuda cuda;
  cuda.make_current(false);
  const std::string message = message_of_opening(cuda.path());
  EXPECT_NE(message.find("no current CUDA context"), std::string::npos) << message;
}

TEST(CudaDriver, ErrorsHaveNames) {
  FakeCuda cuda;
  const CudaDriver driver(cuda.path());
  EXPECT_NO_THROW(driver.check(kCuSuccess, "cuX"));
  try {
    driver.check(2, "cuMemHostAlloc");
    FAIL();
  } catch (const std::runtime_error& error) {
    EXPECT_STREQ(error.what(), "cuMemHostAlloc: CUDA_ERROR_OUT_OF_MEMORY (2, as the test asked)");
  }
}

TEST(CudaDriver, TheContextBecomesCurrentInAnyThread) {
  FakeCuda cuda;
  const CudaDriver driver(cuda.path());
  std::thread([&] {
    CuContext context = nullptr;
    {
      const CurrentContext current(driver);
      ASSERT_EQ(driver.api().ctx_get_current(&context), kCuSuccess);
      EXPECT_EQ(context, driver.context());
    }
    ASSERT_EQ(driver.api().ctx_get_current(&context), kCuSuccess);
    EXPECT_EQ(context, nullptr);
  }).join();
}

}  // namespace
}  // namespace ktrt
