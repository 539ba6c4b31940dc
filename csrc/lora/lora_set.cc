#include "lora/lora_set.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/check.h"

namespace ktrt {

namespace {

// For each rank, the weight of the LoRA that it belongs to.
std::vector<float> spread(const ExpertLora::Shrink& shrink, std::span<const float> weights) {
  std::vector<float> factors;
  for (const int owner : shrink.owners) factors.push_back(weights[static_cast<std::size_t>(owner)]);
  return factors;
}

LoraFactors make_factors(const ExpertLora& lora, std::span<const float> weights) {
  return {spread(lora.input_shrink(), weights), spread(lora.down_shrink(), weights)};
}

std::vector<LoraFactors> factor_table(const ExpertLora& lora, std::span<const float> weights) {
  std::vector<LoraFactors> table{make_factors(lora, weights)};
  std::vector<float> only(weights.size(), 0.0f);
  for (std::size_t i = 0; i < weights.size(); ++i) {
    only[i] = weights[i];
    table.push_back(make_factors(lora, only));
    only[i] = 0.0f;
  }
  table.push_back(make_factors(lora, only));
  return table;
}

void check_request(std::span<const int> ids, std::span<const float> weights) {
  KTRT_CHECK(ids.size() == weights.size(), "there are " << ids.size() << " LoRAs and "
                                                        << weights.size()
                                                        << " weights, expected one for each");
  for (std::size_t i = 0; i < ids.size(); ++i) {
    KTRT_CHECK(std::isfinite(weights[i]),
               "the weight of LoRA " << ids[i] << " is " << weights[i] << ", expected a number");
    KTRT_CHECK(std::find(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(i), ids[i]) ==
                   ids.begin() + static_cast<std::ptrdiff_t>(i),
               "LoRA " << ids[i] << " is named twice");
  }
}

}  // namespace

bool ActiveLora::plain() const {
  return std::all_of(weights.begin(), weights.end(), [](float w) { return w == 1.0f; });
}

bool ActiveLora::silent() const {
  return std::all_of(weights.begin(), weights.end(), [](float w) { return w == 0.0f; });
}

void LoraSet::put(const MoeShape& shape, int id, std::shared_ptr<const ExpertLora> lora) {
  KTRT_CHECK(id >= 0, "the LoRA's number is " << id << ", expected 0 or more");
  const std::shared_ptr<const ExpertLora> before = std::exchange(loras_[id], std::move(lora));
  if (before == nullptr) return;
  if (std::count(combined_ids_.begin(), combined_ids_.end(), id) > 0) {
    combined_ids_.clear();
    combined_.reset();
  }
  if (active_ == nullptr || std::count(active_->ids.begin(), active_->ids.end(), id) == 0) return;
  const std::shared_ptr<const ActiveLora> active = std::exchange(active_, nullptr);
  try {
    activate(shape, active->ids, active->weights);
  } catch (...) {
    loras_[id] = before;
    active_ = active;
    throw;
  }
}

void LoraSet::remove(int id) {
  const auto found = loras_.find(id);
  KTRT_CHECK(found != loras_.end(), "there is no LoRA " << id);
  KTRT_CHECK(active_ == nullptr || std::count(active_->ids.begin(), active_->ids.end(), id) == 0,
             "LoRA " << id << " is active; activate another, or none, before it is removed");
  loras_.erase(found);
  if (std::count(combined_ids_.begin(), combined_ids_.end(), id) > 0) {
    combined_ids_.clear();
    combined_.reset();
  }
}

void LoraSet::clear() {
  active_.reset();
  combined_.reset();
  combined_ids_.clear();
  loras_.clear();
}

std::vector<std::shared_ptr<const ExpertLora>> LoraSet::members(std::span<const int> ids) const {
  std::vector<std::shared_ptr<const ExpertLora>> found;
  for (const int id : ids) {
    const auto entry = loras_.find(id);
    KTRT_CHECK(entry != loras_.end(),
               "there is no LoRA " << id << "; the layer holds " << loras_.size());
    found.push_back(entry->second);
  }
  return found;
}

bool LoraSet::activate(const MoeShape& shape, std::span<const int> ids,
                       std::span<const float> weights) {
  check_request(ids, weights);
  const auto parts = members(ids);
  if (ids.empty()) return std::exchange(active_, nullptr) != nullptr;
  if (active_ != nullptr && std::ranges::equal(ids, active_->ids) &&
      std::ranges::equal(weights, active_->weights)) {
    return false;
  }
  auto next = std::make_shared<ActiveLora>();
  next->ids.assign(ids.begin(), ids.end());
  next->weights.assign(weights.begin(), weights.end());
  next->lora = parts.size() == 1 ? parts.front() : combine(shape, ids);
  next->factors = factor_table(*next->lora, weights);
  active_ = std::move(next);
  return true;
}

std::shared_ptr<const ExpertLora> LoraSet::combine(const MoeShape& shape,
                                                   std::span<const int> ids) {
  if (!std::ranges::equal(ids, combined_ids_)) {
    std::vector<const ExpertLora*> parts;
    const auto held = members(ids);
    for (const auto& part : held) parts.push_back(part.get());
    auto combined = std::make_shared<const ExpertLora>(shape, parts);
    combined_ids_.assign(ids.begin(), ids.end());
    combined_ = std::move(combined);
  }
  return combined_;
}

std::span<const int> LoraSet::choose(const TensorView& adapter_ids) {
  static const std::vector<int> kNone;
  const std::vector<int>& ids = active_ == nullptr ? kNone : active_->ids;
  choice_.clear();
  for (std::int64_t token = 0; token < adapter_ids.shape[0]; ++token) {
    const std::byte* value = adapter_ids.row(token);
    const std::int64_t id = adapter_ids.dtype == DType::kInt64
                                ? *reinterpret_cast<const std::int64_t*>(value)
                                : *reinterpret_cast<const std::int32_t*>(value);
    const auto found = std::find(ids.begin(), ids.end(), id);
    KTRT_CHECK(id == -1 || found != ids.end(), adapter_ids.name
                                                   << "[" << token << "] is " << id
                                                   << ", expected -1 or an active LoRA");
    const auto index = id == -1 ? ids.size() : static_cast<std::size_t>(found - ids.begin());
    choice_.push_back(static_cast<int>(index) + 1);
  }
  return choice_;
}

}  // namespace ktrt
