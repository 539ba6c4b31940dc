// The packed weights of all routed experts of one layer.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/mapped_file.h"
#include "base/tensor_view.h"
#include "layout/expert_shape.h"
#include "layout/pack.h"
#include "layout/packed_layout.h"

namespace ktrt {

// Addresses of one strip of one expert's matrix.
struct StripRef {
  const std::uint8_t* block = nullptr;  // the n-block that holds it
  int block_rows = 0;
  int row_in_block = 0;
  const std::uint8_t* first_tile = nullptr;
  const float* scales = nullptr;       // PackedLayout::strip_scales(); null for none
  const std::int32_t* sums = nullptr;  // [32]; null where activations stay BF16
};

// Every matrix is cut by output rows into `parts` shards of whole strips, each packed as a separate
// matrix in its part's memory, so that a NUMA node reads only local memory. A row's dot
// product is never cut: results do not depend on the number of parts.
//
// Files that kt_kernel made for several NUMA nodes cut down's columns instead, every slice with
// its own scales; `down_slices` is their number. That is a property of the numbers, so it is
// independent of the parts, and results depend on it.
//
// A part's memory is one image, codes, scales, sums, which can be written to a file and mapped.
class ExpertWeights {
 public:
  static constexpr int kMaxDownSlices = 8;

  // Throws std::invalid_argument for sizes below 1 and slices that are not whole tiles.
  ExpertWeights(const MoeShape& shape, WeightFormat format, int parts, int down_slices = 1);

  // Reserves memory where there is none; pages are touched as experts are packed. A mapped file is
  // given up, and all experts with it. Throws std::bad_alloc.
  void allocate();

  const MoeShape& shape() const { return shape_; }
  WeightFormat format() const { return format_; }
  int parts() const { return static_cast<int>(parts_.size()); }
  int down_slices() const { return down_slices_; }
  int slices(Projection projection) const {
    return projection == Projection::kDown ? down_slices_ : 1;
  }
  // Layout of the whole matrix; for down, of one slice.
  const PackedLayout& layout(Projection projection) const {
    return layouts_[static_cast<std::size_t>(projection)];
  }
  // The first strip of `part`; of parts(): the number of strips.
  int first_strip(Projection projection, int part) const {
    return layout(projection).strips() * part / parts();
  }
  PackedMatrix matrix(int expert, Projection projection, int part, int slice = 0) const;
  StripRef strip(int expert, Projection projection, int strip, int slice = 0) const;

  bool loaded(int expert) const { return loaded_[static_cast<std::size_t>(expert)]; }
  bool all_loaded() const { return first_missing() == shape_.num_experts; }
  int first_missing() const;
  void set_loaded(int expert, bool loaded) { loaded_[static_cast<std::size_t>(expert)] = loaded; }

  // Codes and scales of all experts.
  std::size_t packed_bytes() const;

  std::size_t image_bytes(int part) const { return this->part(part).bytes; }
  // The part's memory; empty before allocate().
  std::span<std::byte> image(int part) const;
  // Replaces the part's memory by a file. The caller has checked its size and contents;
  // it is never written to.
  void use_file(int part, MappedFile file);
  bool mapped() const { return !parts_.front().file.empty(); }

  // One shard of all matrices; an expert's three matrices lie one after the other.
  struct Part {
    PackedLayout layouts[kProjections];
    std::size_t code_offset[kProjections] = {};   // inside one expert's codes
    std::size_t scale_offset[kProjections] = {};  // inside one expert's scales, and sums
    std::size_t expert_code_bytes = 0;
    std::size_t expert_scales = 0;
    std::size_t scales_offset = 0;  // inside the image; 0: none
    std::size_t sums_offset = 0;    // as many as scales; 0: none
    std::size_t bytes = 0;
    AlignedBuffer memory;
    MappedFile file;  // instead of memory
    std::byte* base() const { return file.empty() ? memory.as<std::byte>() : file.data(); }
  };
  const Part& part(int index) const { return parts_[static_cast<std::size_t>(index)]; }

 private:
  Part make_part(int part) const;

  MoeShape shape_;
  WeightFormat format_;
  int down_slices_;
  PackedLayout layouts_[kProjections];
  std::vector<Part> parts_;
  std::vector<bool> loaded_;
};

}  // namespace ktrt
