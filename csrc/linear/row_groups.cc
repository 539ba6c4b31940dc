#include "linear/row_groups.h"

#include <numeric>

namespace ktrt {

void RowGroups::add(std::span<const int> of_row, int mixes, std::int64_t begin, std::int64_t end,
                    int most) {
  const auto mix_of = [&](std::int64_t row) { return of_row[static_cast<std::size_t>(row)]; };
  // Counting sort: ends_[mix] is where the mix's next row goes.
  ends_.assign(static_cast<std::size_t>(mixes), 0);
  for (std::int64_t row = begin; row < end; ++row) ++ends_[static_cast<std::size_t>(mix_of(row))];
  std::exclusive_scan(ends_.begin(), ends_.end(), ends_.begin(), std::int64_t{0});
  sorted_.resize(static_cast<std::size_t>(end - begin));
  for (std::int64_t row = begin; row < end; ++row) {
    sorted_[static_cast<std::size_t>(ends_[static_cast<std::size_t>(mix_of(row))]++)] = row;
  }
  for (std::size_t i = 0; i < sorted_.size();) {
    RowGroup group{sorted_[i], 1, 1, mix_of(sorted_[i])};
    for (++i; i < sorted_.size() && group.rows < most && mix_of(sorted_[i]) == group.mix; ++i) {
      const std::int64_t step = sorted_[i] - sorted_[i - 1];
      if (group.rows == 1) group.step = step;
      if (step != group.step) break;
      ++group.rows;
    }
    groups_.push_back(group);
  }
}

}  // namespace ktrt
