// Rows of a forward that share a LoRA, in groups that a kernel takes at once without a copy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace ktrt {

// Rows first, first + step, …, all of one mix (LoraTable::Rows).
struct RowGroup {
  std::int64_t first = 0;
  std::int64_t step = 1;
  int rows = 0;
  int mix = 0;
};

// Kept from forward to forward for its memory.
class RowGroups {
 public:
  void clear() { groups_.clear(); }
  // Appends the groups of rows [begin, end), each of at most `most` rows, a mix's one after the
  // other. of_row: each row's mix, below `mixes`.
  void add(std::span<const int> of_row, int mixes, std::int64_t begin, std::int64_t end, int most);

  std::size_t size() const { return groups_.size(); }
  const RowGroup& operator[](std::size_t index) const { return groups_[index]; }

 private:
  std::vector<RowGroup> groups_;
  std::vector<std::int64_t> sorted_;  // rows by mix
  std::vector<std::int64_t> ends_;    // [mixes] in sorted_
};

}  // namespace ktrt
