#include "moe/dispatch_plan.h"

#include <algorithm>
#include <numeric>

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

// Tokens by mix, so that rows which are placed in this order are by mix within every expert.
void DispatchPlan::sort_tokens(std::int64_t qlen, const TokenMixes& mixes) {
  order_.resize(static_cast<std::size_t>(qlen));
  if (mixes.of_token == nullptr) {
    std::iota(order_.begin(), order_.end(), 0);
    return;
  }
  mix_offsets_.assign(static_cast<std::size_t>(mixes.count) + 1, 0);
  for (std::int64_t t = 0; t < qlen; ++t) {
    if (mixes.of_token[t] != kNoMix)
      ++mix_offsets_[static_cast<std::size_t>(mixes.of_token[t]) + 1];
  }
  std::partial_sum(mix_offsets_.begin(), mix_offsets_.end(), mix_offsets_.begin());
  order_.resize(static_cast<std::size_t>(mix_offsets_.back()));
  for (std::int64_t t = 0; t < qlen; ++t) {
    if (mixes.of_token[t] == kNoMix) continue;
    auto& next = mix_offsets_[static_cast<std::size_t>(mixes.of_token[t])];
    order_[static_cast<std::size_t>(next++)] = static_cast<int>(t);
  }
}

// The bucket of every (token, slot), and where each bucket's rows start.
void DispatchPlan::count_rows(const TensorView& expert_ids, int num_experts,
                              const TokenMixes& mixes) {
  const std::int64_t qlen = expert_ids.shape[0];
  const std::int64_t slots = expert_ids.shape[1];
  buckets_.clear();
  offsets_.assign(static_cast<std::size_t>(num_experts * token_blocks_) + 1, 0);
  for (std::int64_t t = 0; t < qlen; ++t) {
    const bool idle = mixes.of_token != nullptr && mixes.of_token[t] == kNoMix;
    for (std::int64_t s = 0; s < slots; ++s) {
      const std::int64_t id = idle ? -1 : read_id(expert_ids, t, s);
      const bool valid = id >= 0 && id < num_experts;
      const std::int64_t bucket = valid ? id * token_blocks_ + t / block_tokens_ : -1;
      buckets_.push_back(static_cast<int>(bucket));
      if (valid) ++offsets_[static_cast<std::size_t>(bucket) + 1];
    }
  }
  for (std::size_t b = 1; b < offsets_.size(); ++b) offsets_[b] += offsets_[b - 1];
}

void DispatchPlan::cut_jobs(int num_experts, int max_job_rows) {
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
}

void DispatchPlan::cut_runs(const TokenMixes& mixes) {
  runs_.clear();
  for (Job& job : jobs_) {
    job.first_run = static_cast<int>(runs_.size());
    const PlanRow* rows = rows_.data() + job.first_row;
    const auto mix_of = [&](int row) {
      return mixes.of_token == nullptr ? 0 : mixes.of_token[rows[row].token];
    };
    for (int first = 0; first < job.rows;) {
      const int mix = mix_of(first);
      int end = mixes.of_token == nullptr ? job.rows : first + 1;
      while (end < job.rows && mix_of(end) == mix) ++end;
      runs_.push_back({first, end - first, mix});
      first = end;
    }
    job.runs = static_cast<int>(runs_.size()) - job.first_run;
  }
}

void DispatchPlan::build(const TensorView& expert_ids, const TensorView& routing_weights,
                         int num_experts, int max_job_rows, const TokenMixes& mixes) {
  const std::int64_t qlen = expert_ids.shape[0];
  const std::int64_t slots = expert_ids.shape[1];
  cut_tokens(qlen, slots, num_experts, max_job_rows);
  sort_tokens(qlen, mixes);
  count_rows(expert_ids, num_experts, mixes);
  cut_jobs(num_experts, max_job_rows);

  rows_.resize(static_cast<std::size_t>(offsets_.back()));
  for (const int t : order_) {
    const int* buckets = buckets_.data() + t * slots;
    for (std::int64_t s = 0; s < slots; ++s) {
      if (buckets[s] < 0) continue;
      // offsets_[b] moves from the start of b's rows to their end.
      auto& next = offsets_[static_cast<std::size_t>(buckets[s])];
      rows_[static_cast<std::size_t>(next++)] = {t, read_weight(routing_weights, t, s)};
    }
  }
  cut_runs(mixes);
}

}  // namespace ktrt
