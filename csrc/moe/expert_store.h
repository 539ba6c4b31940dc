// The weights and biases of one layer's routed experts: loading, images and views. Every call takes
// the engine's lock, except the ones marked for a forward and for close.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/mapped_file.h"
#include "base/tensor_view.h"
#include "engine/engine.h"
#include "layout/coded.h"
#include "moe/expert_biases.h"
#include "moe/expert_weights.h"

namespace ktrt {

// One packed matrix as kt_kernel keeps it in files: codes [bytes] uint8, scales [n] float32.
struct PackedShard {
  TensorView codes;
  TensorView scales;
};

// How image files become the layer's memory. kAuto maps files in huge pages (decoding from
// small ones is a third slower), and copies everything else and whatever has a NUMA node to lie on.
enum class ImageUse { kAuto, kMap, kCopy };

class ExpertStore {
 public:
  // `down_slices`: see ExpertWeights. Throws std::invalid_argument.
  ExpertStore(std::shared_ptr<Engine> engine, const MoeShape& shape, WeightFormat format,
              int down_slices);

  const MoeShape& shape() const { return shape_; }
  WeightFormat format() const { return format_; }
  int down_slices() const { return down_slices_; }
  bool has_biases() const;

  // gate (only where the experts have one), up [intermediate, hidden], down [hidden, intermediate];
  // float32, float16 or bfloat16. Throws std::invalid_argument: shapes, dtypes, expert out of
  // range, a weight that is not finite.
  void load_expert(int expert, const std::optional<TensorView>& gate, const TensorView& up,
                   const TensorView& down);

  // The same from matrices as checkpoints ship them, for layers of coded formats. Throws
  // std::invalid_argument: shapes, dtypes, a NaN code, a scale that is not finite.
  void load_coded_expert(int expert, const std::optional<CodedSource>& gate, const CodedSource& up,
                         const CodedSource& down);

  // Biases of all experts, see ExpertBiases; replaces earlier ones.
  void set_biases(const std::optional<TensorView>& gate, const std::optional<TensorView>& up,
                  const std::optional<TensorView>& down);

  // As load_expert(), from kt_kernel's packed matrices, used as they are: gate and up in shards of
  // equally many rows, down in `down_slices` shards of columns. Throws std::invalid_argument:
  // sizes, a scale that is not finite, a BF16 layer (kt_kernel has no such files).
  void load_packed_expert(int expert, std::span<const PackedShard> gate,
                          std::span<const PackedShard> up, std::span<const PackedShard> down);

  // Image files: one per part, written by the layer that packed the experts, mapped or
  // copied instead of packing in a layer of the same engine parts, shape and format.
  std::vector<std::size_t> image_bytes() const;
  // Appends a part's image to an open file and returns its digest. Throws std::system_error.
  std::uint64_t write_image(int part, int fd);
  // Returns whether the files stay mapped (kMap), or were copied. Throws std::invalid_argument if a
  // size or a digest is not as expected, std::system_error.
  ImageUse use_images(std::span<const int> fds, std::span<const std::uint64_t> digests,
                      ImageUse use);

  std::size_t packed_bytes() const;

  // Copies of one packed matrix, in kt_kernel's byte order, part after part, slice after slice.
  std::vector<std::uint8_t> packed_codes(int expert, Projection projection);
  std::vector<float> packed_scales(int expert, Projection projection);

  // The packed memory itself, kept alive by the pointer, also after the engine is closed.
  // Throws std::invalid_argument while an expert is missing.
  std::shared_ptr<const ExpertWeights> share_weights();
  // The biases likewise; null where there are none. Later ones have other memory.
  std::shared_ptr<const ExpertBiases> share_biases() const;

  // For a forward, which holds the lock; not once the engine is closed.
  const ExpertWeights& weights() const { return *weights_; }
  const ExpertBiases* biases() const { return biases_.get(); }
  // Throws std::invalid_argument naming the first missing expert.
  void check_all_loaded() const;

  // For the engine's close, which holds the lock.
  void release();

 private:
  void check_gate(bool given) const;
  void pack(ThreadPool& pool, int expert, Projection projection, const TensorView& source);
  void pack_coded(ThreadPool& pool, int expert, Projection projection, const CodedSource& source);
  // Calls pack(matrix, strip, first row of the matrix, slice) for every strip of a projection, on a
  // thread of the strip's part; returns whether all returned true.
  template <class Pack>
  bool for_each_strip(ThreadPool& pool, int expert, Projection projection, const Pack& pack);
  void copy_shards(ThreadPool& pool, int expert, Projection projection,
                   std::span<const PackedShard> shards);
  void copy_images(ThreadPool& pool, const std::vector<MappedFile>& files);
  std::uint64_t parallel_digest(ThreadPool& pool, const std::byte* data, std::size_t bytes);
  void check_expert(int expert) const;
  void check_loaded(int expert) const;

  const std::shared_ptr<Engine> engine_;
  const MoeShape shape_;
  const WeightFormat format_;
  const int down_slices_;
  std::shared_ptr<ExpertWeights> weights_;      // null once the engine is closed
  std::shared_ptr<const ExpertBiases> biases_;  // null: none
};

}  // namespace ktrt
