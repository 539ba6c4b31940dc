// The LoRAs that an operator holds by number, which of them act with what weights, and which of
// them each row of a forward takes.
//
// Nothing here copies A or B: a row's LoRA is a list of parts, pointers with weights, so that a
// change of the set or of a batch's adapters costs no more than that list, and ranks may sum to
// anything.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "base/check.h"

namespace ktrt {

// A row names its LoRA by its number (at weight 1), or by one of these.
inline constexpr std::int32_t kBaseRow = -1;    // none
inline constexpr std::int32_t kActiveRow = -2;  // the active sum
inline constexpr std::int32_t kIdleRow = -3;    // none, and nobody reads the row's results

// [count] the LoRA of each row, checked against the rows by whoever reads them; null: kActiveRow
// for all.
struct AdapterIds {
  const std::int32_t* ids = nullptr;
  std::int64_t count = 0;
};

template <class Lora>
class LoraTable {
 public:
  struct Part {
    const Lora* lora;
    float weight;  // not 0
    bool operator==(const Part&) const = default;
  };
  // The LoRA of a row: nothing, one, or a weighted sum of several, in the order of activate().
  using Mix = std::vector<Part>;

  // The mixes of a forward's rows, each once. Valid as long as the table is not changed: a forward
  // holds the engine's lease meanwhile. Kept from forward to forward for its memory.
  struct Rows {
    std::vector<std::int32_t> ids;  // [mixes]
    std::vector<Mix> mixes;
    std::vector<int> of_row;  // [rows]
    const Mix& mix(std::int64_t row) const {
      return mixes[static_cast<std::size_t>(of_row[static_cast<std::size_t>(row)])];
    }
    // Whether no row adds anything.
    bool silent() const {
      return std::all_of(mixes.begin(), mixes.end(), [](const Mix& m) { return m.empty(); });
    }
  };

  // Adds or replaces a LoRA; one that is active is replaced there too. Throws
  // std::invalid_argument for a negative number.
  void put(int id, std::shared_ptr<const Lora> lora) {
    KTRT_CHECK(id >= 0, "the LoRA's number is " << id << ", expected 0 or more");
    loras_[id] = std::move(lora);
    make_active();
  }

  // Throws std::invalid_argument if there is none, or if it is active.
  void remove(int id) {
    KTRT_CHECK(loras_.count(id) > 0, "there is no LoRA " << id);
    KTRT_CHECK(std::count(ids_.begin(), ids_.end(), id) == 0,
               "LoRA " << id << " is active; activate another, or none, before it is removed");
    loras_.erase(id);
  }

  void clear() {
    active_.clear();
    ids_.clear();
    weights_.clear();
    loras_.clear();
  }

  // The sum of these LoRAs, each times its weight; none: the base. Throws std::invalid_argument: a
  // number that is not held or given twice, a weight that is not finite; what was active then
  // stays so. Returns whether anything changed.
  bool activate(std::span<const int> ids, std::span<const float> weights) {
    check_request(ids, weights);
    if (std::ranges::equal(ids, ids_) && std::ranges::equal(weights, weights_)) return false;
    ids_.assign(ids.begin(), ids.end());
    weights_.assign(weights.begin(), weights.end());
    make_active();
    return true;
  }

  // As activate() was told.
  const std::vector<int>& active_ids() const { return ids_; }
  const std::vector<float>& active_weights() const { return weights_; }
  const Mix& active() const { return active_; }
  std::size_t size() const { return loras_.size(); }
  // The numbers that are held, ascending.
  std::vector<int> numbers() const {
    std::vector<int> found;
    for (const auto& [id, lora] : loras_) found.push_back(id);
    return found;
  }
  // The memory of all that are held, in whole pages.
  std::size_t bytes() const {
    std::size_t sum = 0;
    for (const auto& [id, lora] : loras_) sum += lora->bytes();
    return sum;
  }
  // Null if there is none.
  std::shared_ptr<const Lora> find(int id) const {
    const auto found = loras_.find(id);
    return found == loras_.end() ? nullptr : found->second;
  }

  // Throws std::invalid_argument for a number that is not held, or another count than `rows`.
  void choose(const AdapterIds& adapters, std::int64_t rows, Rows& out) const {
    KTRT_CHECK(adapters.ids == nullptr || adapters.count == rows,
               "there are " << adapters.count << " adapter ids for " << rows << " rows");
    out.ids.clear();
    out.of_row.assign(static_cast<std::size_t>(rows), 0);
    std::size_t mixes = 0;
    for (std::int64_t row = 0; row < rows; ++row) {
      const std::int32_t id = adapters.ids == nullptr ? kActiveRow : adapters.ids[row];
      const auto known = std::find(out.ids.begin(), out.ids.end(), id);
      const auto index = static_cast<std::size_t>(known - out.ids.begin());
      out.of_row[static_cast<std::size_t>(row)] = static_cast<int>(index);
      if (known != out.ids.end()) continue;
      out.ids.push_back(id);
      if (out.mixes.size() == mixes) out.mixes.emplace_back();
      fill(id, row, out.mixes[mixes++]);
    }
    out.mixes.resize(mixes);
  }

 private:
  void fill(std::int32_t id, std::int64_t row, Mix& mix) const {
    mix.clear();
    if (id == kBaseRow || id == kIdleRow) return;
    if (id == kActiveRow) {
      mix = active_;
      return;
    }
    const auto found = loras_.find(id);
    KTRT_CHECK(found != loras_.end(), "adapter_ids[" << row << "] is " << id
                                                     << ", expected the number of a LoRA that is "
                                                     << "held, " << kBaseRow << " for none or "
                                                     << kActiveRow << " for the active ones");
    mix.push_back({found->second.get(), 1.0f});
  }

  void check_request(std::span<const int> ids, std::span<const float> weights) const {
    KTRT_CHECK(ids.size() == weights.size(), "there are " << ids.size() << " LoRAs and "
                                                          << weights.size()
                                                          << " weights, expected one for each");
    for (std::size_t i = 0; i < ids.size(); ++i) {
      KTRT_CHECK(std::isfinite(weights[i]),
                 "the weight of LoRA " << ids[i] << " is " << weights[i] << ", expected a number");
      KTRT_CHECK(loras_.count(ids[i]) > 0,
                 "there is no LoRA " << ids[i] << "; " << loras_.size() << " are held");
      KTRT_CHECK(std::count(ids.begin(), ids.end(), ids[i]) == 1,
                 "LoRA " << ids[i] << " is named twice");
    }
  }

  void make_active() {
    active_.clear();
    for (std::size_t i = 0; i < ids_.size(); ++i) {
      if (weights_[i] != 0.0f) active_.push_back({loras_.at(ids_[i]).get(), weights_[i]});
    }
  }

  std::map<int, std::shared_ptr<const Lora>> loras_;
  std::vector<int> ids_;
  std::vector<float> weights_;
  Mix active_;
};

}  // namespace ktrt
