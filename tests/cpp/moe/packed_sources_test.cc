// Layers that take their experts in packed form: image files and kt_kernel's matrices.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>
#include <system_error>
#include <tuple>
#include <vector>

#include "moe/layer_case.h"

namespace ktrt {
namespace {

using testing::forward;
using testing::LayerCase;
using testing::make_engine;
using testing::random_batch;

constexpr MoeShape kShape{4, 2, 160, 256};

// The image files of a layer, one per part.
class Images {
 public:
  explicit Images(MoeLayer& layer) {
    for (std::size_t part = 0; part < layer.experts().image_bytes().size(); ++part) {
      std::string name = "/tmp/ktrt_image_XXXXXX";
      fds.push_back(mkstemp(name.data()));
      unlink(name.c_str());
      digests.push_back(layer.experts().write_image(static_cast<int>(part), fds.back()));
    }
  }
  ~Images() {
    for (const int fd : fds) close(fd);
  }
  std::vector<int> fds;
  std::vector<std::uint64_t> digests;
};

class ImagesTest : public ::testing::TestWithParam<std::tuple<WeightFormat, int>> {
 protected:
  const WeightFormat format_ = std::get<0>(GetParam());
  const int parts_ = std::get<1>(GetParam());
  LayerCase case_{kShape, format_};
};

INSTANTIATE_TEST_SUITE_P(Formats, ImagesTest,
                         ::testing::Combine(::testing::Values(WeightFormat::kBf16,
                                                              WeightFormat::kInt8),
                                            ::testing::Values(1, 2)));

TEST_P(ImagesTest, MappedAndCopiedLayersAreThePackedOne) {
  const auto engine = make_engine(2, 64, detected_isa(), parts_);
  case_.add_lora(4, 0, 3);
  const auto packed = case_.make_layer(engine);
  const Images images(*packed);
  const auto batch = random_batch(kShape, 9);
  const std::vector<float> expected = forward(*packed, batch);
  for (const ImageUse use : {ImageUse::kAuto, ImageUse::kMap, ImageUse::kCopy}) {
    MoeLayer layer(engine, kShape, format_);
    EXPECT_THROW(layer.experts().write_image(0, images.fds[0]), std::invalid_argument);
    const ImageUse used = layer.experts().use_images(images.fds, images.digests, use);
    EXPECT_EQ(used, use == ImageUse::kAuto ? used : use);
    // LoRA is the adapter's, not the image's.
    EXPECT_NE(forward(layer, batch), expected);
    case_.set_lora(layer);
    EXPECT_EQ(forward(layer, batch), expected);
    EXPECT_EQ(layer.experts().packed_codes(1, Projection::kDown),
              packed->experts().packed_codes(1, Projection::kDown));
    EXPECT_EQ(layer.experts().packed_bytes(), packed->experts().packed_bytes());
  }
}

TEST_P(ImagesTest, PackingReplacesAMappedFile) {
  const auto engine = make_engine(1, 64, detected_isa(), 1);
  const auto packed = case_.make_layer(engine);
  const Images images(*packed);
  MoeLayer layer(engine, kShape, format_);
  layer.experts().use_images(images.fds, images.digests, ImageUse::kMap);
  case_.load(layer, 0);
  EXPECT_THROW(layer.experts().packed_codes(1, Projection::kGate), std::invalid_argument);
  for (int e = 1; e < kShape.num_experts; ++e) case_.load(layer, e);
  const auto batch = random_batch(kShape, 3);
  EXPECT_EQ(forward(layer, batch), forward(*packed, batch));
}

TEST_P(ImagesTest, DamageIsFound) {
  const auto engine = make_engine(parts_, 64, detected_isa(), parts_);
  const auto packed = case_.make_layer(engine);
  const std::vector<std::size_t> sizes = packed->experts().image_bytes();
  for (int part = 0; part < parts_; ++part) {
    const auto p = static_cast<std::size_t>(part);
    for (const std::size_t where : {std::size_t{0}, sizes[p] / 2, sizes[p] - 1}) {
      const Images images(*packed);
      char byte = 0;
      ASSERT_EQ(pread(images.fds[p], &byte, 1, static_cast<off_t>(where)), 1);
      byte = static_cast<char>(byte ^ 16);
      ASSERT_EQ(pwrite(images.fds[p], &byte, 1, static_cast<off_t>(where)), 1);
      MoeLayer layer(engine, kShape, format_);
      EXPECT_THROW(layer.experts().use_images(images.fds, images.digests, ImageUse::kAuto),
                   std::invalid_argument);
      EXPECT_THROW(layer.experts().packed_codes(0, Projection::kGate), std::invalid_argument);
    }
    const Images images(*packed);
    ASSERT_EQ(ftruncate(images.fds[p], static_cast<off_t>(sizes[p] - 4096)), 0);
    MoeLayer layer(engine, kShape, format_);
    EXPECT_THROW(layer.experts().use_images(images.fds, images.digests, ImageUse::kAuto),
                 std::invalid_argument);
    EXPECT_THROW(layer.experts().use_images({}, images.digests, ImageUse::kAuto),
                 std::invalid_argument);
  }
}

TEST_P(ImagesTest, DigestsDoNotDependOnThreads) {
  const auto one = make_engine(parts_, 64, detected_isa(), parts_);
  const auto three = make_engine(parts_ + 2, 64, detected_isa(), parts_);
  EXPECT_EQ(Images(*case_.make_layer(one)).digests, Images(*case_.make_layer(three)).digests);
}

TEST(Images, AFullDiskIsAnError) {
  const auto engine = make_engine(1);
  const auto packed = LayerCase(kShape, WeightFormat::kInt8).make_layer(engine);
  const int full = open("/dev/full", O_WRONLY);
  EXPECT_THROW(packed->experts().write_image(0, full), std::system_error);
  EXPECT_THROW(packed->experts().write_image(1, full), std::invalid_argument);
  close(full);
}

// The contents of kt_kernel's files for `slices` NUMA nodes, cut out of a layer that was packed
// that way.
struct KtExpert {
  KtExpert(MoeLayer& layer, int expert, int slices) {
    for (int p = 0; p < kProjections; ++p) {
      const auto projection = static_cast<Projection>(p);
      codes[p] = layer.experts().packed_codes(expert, projection);
      scales[p] = layer.experts().packed_scales(expert, projection);
      const auto count = static_cast<std::size_t>(slices);
      for (std::size_t s = 0; s < count; ++s) {
        const auto c = codes[p].size() / count;
        const auto n = scales[p].size() / count;
        shards[p].push_back({testing::view_of(codes[p].data() + s * c, DType::kUint8,
                                              {static_cast<int>(c)}, "codes"),
                             testing::view_of(scales[p].data() + s * n, DType::kFloat32,
                                              {static_cast<int>(n)}, "scales")});
      }
    }
  }
  std::vector<std::uint8_t> codes[kProjections];
  std::vector<float> scales[kProjections];
  std::vector<PackedShard> shards[kProjections];
};

class KtMatrices : public ::testing::TestWithParam<std::tuple<int, int>> {};

INSTANTIATE_TEST_SUITE_P(SlicesAndParts, KtMatrices,
                         ::testing::Combine(::testing::Values(1, 2, 4), ::testing::Values(1, 3)));

// Gate and up have 256 / 4 = 64 rows a shard, a whole n-block: the whole matrix is the shards one
// after the other, as is down, slice after slice.
TEST_P(KtMatrices, LoadedAsTheyAreEqualOwnPacking) {
  const auto [slices, parts] = GetParam();
  LayerCase test(kShape, WeightFormat::kInt8);
  test.add_lora(0, 2, 5);
  const auto whole = make_engine(1);
  MoeLayer own(whole, kShape, WeightFormat::kInt8, Activation{}, slices);
  for (int e = 0; e < kShape.num_experts; ++e) test.load(own, e);
  test.set_lora(own);
  MoeLayer loaded(make_engine(3, 64, detected_isa(), parts), kShape, WeightFormat::kInt8,
                  Activation{}, slices);
  for (int e = 0; e < kShape.num_experts; ++e) {
    const KtExpert kt(own, e, slices);
    loaded.experts().load_packed_expert(e, kt.shards[0], kt.shards[1], kt.shards[2]);
  }
  test.set_lora(loaded);
  const auto batch = random_batch(kShape, 13);
  EXPECT_EQ(forward(loaded, batch), forward(own, batch));
  EXPECT_LT(testing::relative_error(forward(own, batch), test.expected(batch)), 0.03);
}

TEST(KtMatricesChecks, WrongShardsAreRefused) {
  const auto engine = make_engine(1);
  LayerCase test(kShape, WeightFormat::kInt8);
  const auto own = test.make_layer(engine);
  KtExpert kt(*own, 0, 1);
  MoeLayer layer(engine, kShape, WeightFormat::kInt8);
  const auto load = [&] {
    layer.experts().load_packed_expert(0, kt.shards[0], kt.shards[1], kt.shards[2]);
  };
  EXPECT_NO_THROW(load());
  kt.scales[1][3] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(load(), std::invalid_argument);
  EXPECT_THROW(layer.experts().packed_codes(0, Projection::kGate), std::invalid_argument);
  kt.scales[1][3] = 1.0f;
  EXPECT_NO_THROW(load());
  --kt.shards[2][0].codes.shape[0];
  EXPECT_THROW(load(), std::invalid_argument);
  MoeLayer two(engine, kShape, WeightFormat::kInt8, Activation{}, 2);
  EXPECT_THROW(two.experts().load_packed_expert(0, kt.shards[0], kt.shards[1], kt.shards[2]),
               std::invalid_argument);
  EXPECT_THROW(MoeLayer(engine, kShape, WeightFormat::kBf16, Activation{}, 2),
               std::invalid_argument);
  EXPECT_THROW(MoeLayer(engine, kShape, WeightFormat::kInt8, Activation{}, 3),
               std::invalid_argument);
}

}  // namespace
}  // namespace ktrt
