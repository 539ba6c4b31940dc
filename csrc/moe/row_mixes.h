// The LoRAs of one forward: the mixes that its tokens take, and where each part's shrunk ranks lie
// in a row of T.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "base/tensor_view.h"
#include "lora/expert_lora.h"
#include "lora/lora_table.h"
#include "moe/dispatch_plan.h"

namespace ktrt {

class RowMixes {
 public:
  // The parts of a mix are applied one after the other; so are their ranks in a shrunk row.
  struct Part {
    const ExpertLora* lora;
    float weight;
    int input_first;  // in a row that is shrunk for gate and up
    int down_first;
  };
  struct Mix {
    std::vector<Part> parts;  // none: the base
    int input_width = 0;      // ranks of a shrunk row
    int down_width = 0;
  };

  // `adapter_ids` [qlen] int32 or int64, see LoraTable; missing: the active sum for all. Throws
  // std::invalid_argument: shape, type, a number that is not held. Valid as long as `table` is not
  // changed; kept from forward to forward for its memory.
  void choose(const LoraTable<ExpertLora>& table, const std::optional<TensorView>& adapter_ids,
              std::int64_t qlen);

  const Mix& mix(int index) const { return mixes_[static_cast<std::size_t>(index)]; }
  // Tokens of equal mixes have the same one; idle tokens have none.
  TokenMixes of_tokens() const;
  // The widest row of any mix; 0: nothing to shrink.
  int input_width() const { return input_width_; }
  int down_width() const { return down_width_; }

 private:
  using Table = LoraTable<ExpertLora>;
  void read_ids(const TensorView& adapter_ids);
  int add_mix(const Table::Mix& parts);

  std::vector<std::int32_t> ids_;
  Table::Rows rows_;
  std::vector<Table::Mix> distinct_;
  std::vector<Mix> mixes_;
  std::vector<int> of_token_;  // empty: the first for all
  int input_width_ = 0;
  int down_width_ = 0;
};

}  // namespace ktrt
