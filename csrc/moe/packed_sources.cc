// Loading of packed weights: kt_kernel's matrices, and image files that the layer wrote.
#include <atomic>
#include <cmath>
#include <cstring>
#include <utility>

#include "base/check.h"
#include "base/digest.h"
#include "base/mapped_file.h"
#include "layout/copy_strip.h"
#include "moe/expert_store.h"

namespace ktrt {

namespace {

// Claimed by one thread at a time: small enough to share a file out, a huge page.
constexpr std::size_t kBlockBytes = std::size_t{2} << 20;

std::size_t blocks_of(std::size_t bytes) { return (bytes + kBlockBytes - 1) / kBlockBytes; }

std::size_t block_size(std::size_t block, std::size_t bytes) {
  return std::min(kBlockBytes, bytes - block * kBlockBytes);
}

void check_shard(const PackedShard& shard, const PackedLayout& layout) {
  KTRT_CHECK(shard.codes.dtype == DType::kUint8,
             shard.codes.name << " is " << name_of(shard.codes.dtype) << ", expected uint8");
  shard.codes.expect_shape({static_cast<std::int64_t>(layout.code_bytes())});
  KTRT_CHECK(shard.scales.dtype == DType::kFloat32,
             shard.scales.name << " is " << name_of(shard.scales.dtype) << ", expected float32");
  shard.scales.expect_shape({layout.padded_n()});
  const auto* scales = static_cast<const float*>(shard.scales.data);
  for (int n = 0; n < layout.padded_n(); ++n) {
    KTRT_CHECK(
        std::isfinite(scales[n]) && scales[n] >= 0.0f,
        shard.scales.name << " of row " << n << " is " << scales[n] << "; the weights are damaged");
  }
}

}  // namespace

void ExpertStore::load_packed_expert(int expert, std::span<const PackedShard> gate,
                                     std::span<const PackedShard> up,
                                     std::span<const PackedShard> down) {
  check_expert(expert);
  KTRT_CHECK(quantizes_rows(format_),
             "the layer's format is "
                 << name_of(format_)
                 << "; kt_kernel's files hold INT8 and INT4 with a scale per row");
  KTRT_CHECK(shape_.has_gate, "the experts have no gate; kt_kernel's files hold one");
  const auto lease = engine_->lease();
  weights_->allocate();
  weights_->set_loaded(expert, false);
  copy_shards(lease.pool(), expert, Projection::kGate, gate);
  copy_shards(lease.pool(), expert, Projection::kUp, up);
  copy_shards(lease.pool(), expert, Projection::kDown, down);
  weights_->set_loaded(expert, true);
}

// Tiles keep their bytes and move to the part of the thread that copies them.
void ExpertStore::copy_shards(ThreadPool& pool, int expert, Projection projection,
                              std::span<const PackedShard> shards) {
  const PackedLayout& whole = weights_->layout(projection);
  const bool by_columns = projection == Projection::kDown;
  const auto count = static_cast<int>(shards.size());
  KTRT_CHECK(!by_columns || count == weights_->down_slices(),
             "down comes in " << count << " shards, expected down_slices ("
                              << weights_->down_slices() << ")");
  KTRT_CHECK(count >= 1 && (by_columns || whole.n() % (count * kStripRows) == 0),
             name_of(projection) << " comes in " << count << " shards; its " << whole.n()
                                 << " rows are not as many whole strips of " << kStripRows);
  const PackedLayout layout(format_, by_columns ? whole.n() : whole.n() / count, whole.k());
  for (const PackedShard& shard : shards) check_shard(shard, layout);
  std::vector<std::atomic<int>> next(static_cast<std::size_t>(weights_->parts()));
  pool.run([&](int thread) {
    const int part = engine_->home()[static_cast<std::size_t>(thread)];
    std::atomic<int>& claim = next[static_cast<std::size_t>(part)];
    const int first = weights_->first_strip(projection, part);
    const int strips = weights_->first_strip(projection, part + 1) - first;
    for (int s = claim++; s < strips; s = claim++) {
      for (int slice = 0; slice < weights_->slices(projection); ++slice) {
        const int strip = first + s;
        const int index = by_columns ? slice : strip / layout.strips();
        const PackedShard& shard = shards[static_cast<std::size_t>(index)];
        const PackedMatrix from{layout, static_cast<std::uint8_t*>(shard.codes.data),
                                static_cast<float*>(shard.scales.data), nullptr};
        copy_strip(from, by_columns ? strip : strip % layout.strips(),
                   weights_->matrix(expert, projection, part, slice), s);
      }
    }
  });
}

std::vector<std::size_t> ExpertStore::image_bytes() const {
  const auto lock = engine_->lock();
  std::vector<std::size_t> bytes;
  for (int part = 0; weights_ && part < weights_->parts(); ++part) {
    bytes.push_back(weights_->image_bytes(part));
  }
  return bytes;
}

std::uint64_t ExpertStore::write_image(int part, int fd) {
  const auto lease = engine_->lease();
  KTRT_CHECK(part >= 0 && part < weights_->parts(),
             "part is " << part << ", expected 0 to " << weights_->parts() - 1);
  KTRT_CHECK(weights_->all_loaded(),
             "expert " << weights_->first_missing() << " has not been loaded");
  const std::span<std::byte> image = weights_->image(part);
  write_all(fd, image.data(), image.size());
  return parallel_digest(lease.pool(), image.data(), image.size());
}

// The number of threads does not matter: the digests of blocks are combined in their order.
std::uint64_t ExpertStore::parallel_digest(ThreadPool& pool, const std::byte* data,
                                           std::size_t bytes) {
  std::vector<std::uint64_t> digests(blocks_of(bytes));
  std::atomic<std::size_t> next{0};
  pool.run([&](int) {
    for (std::size_t block = next++; block < digests.size(); block = next++) {
      digests[block] = digest(data + block * kBlockBytes, block_size(block, bytes));
    }
  });
  return digest_of_digests(digests);
}

ImageUse ExpertStore::use_images(std::span<const int> fds, std::span<const std::uint64_t> digests,
                                 ImageUse use) {
  const auto lease = engine_->lease();
  const auto parts = static_cast<std::size_t>(weights_->parts());
  KTRT_CHECK(fds.size() == parts && digests.size() == parts,
             fds.size() << " image files with " << digests.size() << " digests, expected " << parts
                        << " of each, one per part");
  KTRT_CHECK(weights_.use_count() == 1, "views of the layer's packed memory are in use");
  std::vector<MappedFile> files;
  bool huge = true;
  for (std::size_t part = 0; part < parts; ++part) {
    const MappedFile& file = files.emplace_back(fds[part]);
    const std::size_t expected = weights_->image_bytes(static_cast<int>(part));
    KTRT_CHECK(file.bytes() == expected,
               "part " << part << " has " << file.bytes() << " bytes, expected " << expected);
    const std::uint64_t found = parallel_digest(lease.pool(), file.data(), file.bytes());
    KTRT_CHECK(found == digests[part],
               "part " << part << " has the digest " << found << ", expected " << digests[part]);
    huge = huge && (use != ImageUse::kAuto || file.huge_bytes() * 2 >= file.bytes());
  }
  if (use == ImageUse::kAuto) use = huge && parts == 1 ? ImageUse::kMap : ImageUse::kCopy;
  if (use == ImageUse::kCopy) copy_images(lease.pool(), files);
  for (std::size_t part = 0; use == ImageUse::kMap && part < parts; ++part) {
    weights_->use_file(static_cast<int>(part), std::move(files[part]));
  }
  for (int expert = 0; expert < shape_.num_experts; ++expert) weights_->set_loaded(expert, true);
  return use;
}

// Every thread copies blocks of its home part, so that their pages lie on its NUMA node.
void ExpertStore::copy_images(ThreadPool& pool, const std::vector<MappedFile>& files) {
  weights_->allocate();
  std::vector<std::atomic<std::size_t>> next(files.size());
  pool.run([&](int thread) {
    const auto part = static_cast<std::size_t>(engine_->home()[static_cast<std::size_t>(thread)]);
    const std::span<std::byte> image = weights_->image(static_cast<int>(part));
    const std::size_t blocks = blocks_of(image.size());
    for (std::size_t block = next[part]++; block < blocks; block = next[part]++) {
      const std::size_t offset = block * kBlockBytes;
      std::memcpy(image.data() + offset, files[part].data() + offset,
                  block_size(block, image.size()));
    }
  });
}

}  // namespace ktrt
