#include "moe/row_mixes.h"

#include <algorithm>
#include <limits>

#include "base/check.h"

namespace ktrt {

void RowMixes::read_ids(const TensorView& adapter_ids) {
  ids_.clear();
  for (std::int64_t token = 0; token < adapter_ids.shape[0]; ++token) {
    const std::byte* value = adapter_ids.row(token);
    const std::int64_t id = adapter_ids.dtype == DType::kInt64
                                ? *reinterpret_cast<const std::int64_t*>(value)
                                : *reinterpret_cast<const std::int32_t*>(value);
    KTRT_CHECK(id >= kIdleRow && id <= std::numeric_limits<std::int32_t>::max(),
               adapter_ids.name << "[" << token << "] is " << id
                                << ", expected the number of a LoRA, " << kBaseRow << " for none, "
                                << kActiveRow << " for the active ones or " << kIdleRow
                                << " for a row that stands for nothing");
    ids_.push_back(static_cast<std::int32_t>(id));
  }
}

// Its index; the same for equal ones.
int RowMixes::add_mix(const Table::Mix& parts) {
  const auto known = std::find(distinct_.begin(), distinct_.end(), parts);
  if (known != distinct_.end()) return static_cast<int>(known - distinct_.begin());
  distinct_.push_back(parts);
  Mix mix;
  for (const Table::Part& part : parts) {
    mix.parts.push_back({part.lora, part.weight, mix.input_width, mix.down_width});
    mix.input_width += part.lora->input_shrink().width();
    mix.down_width += part.lora->down_shrink().width();
  }
  input_width_ = std::max(input_width_, mix.input_width);
  down_width_ = std::max(down_width_, mix.down_width);
  mixes_.push_back(std::move(mix));
  return static_cast<int>(mixes_.size()) - 1;
}

void RowMixes::choose(const Table& table, const std::optional<TensorView>& adapter_ids,
                      std::int64_t qlen) {
  distinct_.clear();
  mixes_.clear();
  of_token_.clear();
  input_width_ = down_width_ = 0;
  if (!adapter_ids) {
    add_mix(table.active());
    return;
  }
  adapter_ids->expect_shape({qlen});
  KTRT_CHECK(
      adapter_ids->dtype == DType::kInt32 || adapter_ids->dtype == DType::kInt64,
      adapter_ids->name << " is " << name_of(adapter_ids->dtype) << ", expected int32 or int64");
  read_ids(*adapter_ids);
  table.choose({ids_.data(), qlen}, qlen, rows_);
  std::vector<int> index;  // of each of the table's mixes
  for (std::size_t i = 0; i < rows_.ids.size(); ++i) {
    index.push_back(rows_.ids[i] == kIdleRow ? kNoMix : add_mix(rows_.mixes[i]));
  }
  const bool same = std::all_of(index.begin(), index.end(), [](int i) { return i == 0; });
  if (same && !index.empty()) return;
  for (const int mix : rows_.of_row) of_token_.push_back(index[static_cast<std::size_t>(mix)]);
}

TokenMixes RowMixes::of_tokens() const {
  if (of_token_.empty()) return {};
  return {of_token_.data(), static_cast<int>(mixes_.size())};
}

}  // namespace ktrt
