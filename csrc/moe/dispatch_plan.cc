#include "moe/dispatch_plan.h"

#include <algorithm>

#include "base/aligned_buffer.h"
#include "base/bf16.h"

namespace ktrt {

namespace {

std::int64_t read_id(const TensorView& ids, std::int64_t row, std::int64_t slot) {
  const std::byte* data = ids.row(row);
  return ids.dtype == DType::kInt64 ? reinterpret_cast<const std::int64_t*>(data)[slot]
                                    : reinterpret_cast<const std::int32_t*>(data)[slot];
}

float read_weight(const TensorView& weights, std::int64_t row, std::int64_t slot) {
  const std::byte* data = weights.row(row);
  switch (weights.dtype) {
    case DType::kFloat16:
      return fp16_to_f32(reinterpret_cast<const fp16_t*>(data)[slot]);
    case DType::kBfloat16:
      return bf16_to_f32(reinterpret_cast<const bf16_t*>(data)[slot]);
    default:
      return reinterpret_cast<const float*>(data)[slot];
  }
}

// The rows of as few evenly filled tiles as possible.
int whole_tiles(int rows) {
  const int tiles = (rows + kMaxTileRows - 1) / kMaxTileRows;
  return round_up(rows, tiles);
}

}  // namespace

void DispatchPlan::cut_tokens(std::int64_t qlen, std::int64_t slots, int num_experts,
                              int max_job_rows) {
  const std::int64_t one = 1;  // at least
  const std::int64_t block_rows = std::int64_t{num_experts} * (max_job_rows - max_job_rows / 5);
  const std::int64_t blocks = std::max(one, (qlen * slots + block_rows / 2) / block_rows);
  const std::int64_t tokens = std::max(one, (qlen + blocks - 1) / blocks);
  block_tokens_ = static_cast<int>(tokens);
  token_blocks_ = static_cast<int>(std::max(one, (qlen + tokens - 1) / tokens));
}

void DispatchPlan::build(const TensorView& expert_ids, const TensorView& routing_weights,
                         int num_experts, int max_job_rows) {
  const std::int64_t qlen = expert_ids.shape[0];
  const std::int64_t slots = expert_ids.shape[1];
  cut_tokens(qlen, slots, num_experts, max_job_rows);
  buckets_.clear();
  offsets_.assign(static_cast<std::size_t>(num_experts * token_blocks_) + 1, 0);
  for (std::int64_t t = 0; t < qlen; ++t) {
    for (std::int64_t s = 0; s < slots; ++s) {
      const std::int64_t id = read_id(expert_ids, t, s);
      const bool valid = id >= 0 && id < num_experts;
      const std::int64_t bucket = valid ? id * token_blocks_ + t / block_tokens_ : -1;
      buckets_.push_back(static_cast<int>(bucket));
      if (valid) ++offsets_[static_cast<std::size_t>(bucket) + 1];
    }
  }
  for (std::size_t b = 1; b < offsets_.size(); ++b) offsets_[b] += offsets_[b - 1];

  jobs_.clear();
  int scratch_row = 0;
  for (int b = 0; b < num_experts * token_blocks_; ++b) {
    const int begin = offsets_[static_cast<std::size_t>(b)];
    const int count = offsets_[static_cast<std::size_t>(b) + 1] - begin;
    const int parts = (count + max_job_rows - 1) / max_job_rows;
    for (int p = 0; p < parts; ++p) {
      const int first = static_cast<int>(static_cast<std::int64_t>(count) * p / parts);
      const int last = static_cast<int>(static_cast<std::int64_t>(count) * (p + 1) / parts);
      jobs_.push_back(
          {b / token_blocks_, begin + first, last - first, scratch_row, b % token_blocks_});
      scratch_row += whole_tiles(last - first);
    }
  }

  rows_.resize(static_cast<std::size_t>(offsets_.back()));
  std::size_t entry = 0;
  for (std::int64_t t = 0; t < qlen; ++t) {
    for (std::int64_t s = 0; s < slots; ++s, ++entry) {
      if (buckets_[entry] < 0) continue;
      // offsets_[b] moves from the start of b's rows to their end.
      auto& next = offsets_[static_cast<std::size_t>(buckets_[entry])];
      rows_[static_cast<std::size_t>(next++)] = {static_cast<int>(t),
                                                 read_weight(routing_weights, t, s)};
    }
  }
}

}  // namespace ktrt
