// The tokens of one forward, grouped by expert.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/tensor_view.h"
#include "kernels/kernel_table.h"

namespace ktrt {

// One (token, slot) that an expert computes.
struct PlanRow {
  int token = 0;
  float weight = 0.0f;  // routing weight
};

// Consecutive rows of a job whose tokens take the same LoRAs.
struct MixRun {
  int first = 0;  // in the job
  int rows = 0;
  int mix = 0;
};

// The tokens' mixes of LoRAs, 0 … count - 1, or kNoMix for a token that gets no row.
inline constexpr int kNoMix = -1;
struct TokenMixes {
  const int* of_token = nullptr;  // [qlen]; null: all tokens take mix 0
  int count = 1;
};

// Consecutive plan rows of one expert, of tokens of one block: the unit whose activations stay in
// the L2 cache.
struct Job {
  int expert = 0;
  int first_row = 0;
  int rows = 0;
  // Its first row in scratch memory, where it has room for whole tiles of rows.
  int scratch_row = 0;
  int token_block = 0;
  int first_run = 0;  // of the plan's runs
  int runs = 0;
};

// Rows that jobs of `rows` altogether may take in scratch memory.
constexpr int max_scratch_rows(int rows) { return rows + rows / kMaxTileRows; }

// Rows are sorted by expert, then mix, then token, then slot. A token's experts are summed in the
// order of its rows, which neither the number of threads nor the other tokens' mixes change. Ids
// outside [0, num_experts) get no row.
class DispatchPlan {
 public:
  // For the down phase, tokens are cut into blocks in which an expert has four fifths of
  // max_job_rows rows on average: few experts then have more than max_job_rows, and two jobs.
  // expert_ids [qlen, k] int32 or int64, routing_weights [qlen, k] float; checked by the caller.
  void build(const TensorView& expert_ids, const TensorView& routing_weights, int num_experts,
             int max_job_rows, const TokenMixes& mixes = {});

  const std::vector<PlanRow>& rows() const { return rows_; }
  const std::vector<Job>& jobs() const { return jobs_; }
  // A job's rows by mix; at least one run.
  std::span<const MixRun> runs(const Job& job) const {
    return {runs_.data() + job.first_run, static_cast<std::size_t>(job.runs)};
  }
  // Tokens b · block_tokens() and on; the last block may have fewer.
  int token_blocks() const { return token_blocks_; }
  int block_tokens() const { return block_tokens_; }

 private:
  void cut_tokens(std::int64_t qlen, std::int64_t slots, int num_experts, int max_job_rows);
  void sort_tokens(std::int64_t qlen, const TokenMixes& mixes);
  void count_rows(const TensorView& expert_ids, int num_experts, const TokenMixes& mixes);
  void cut_jobs(int num_experts, int max_job_rows);
  void cut_runs(const TokenMixes& mixes);

  std::vector<int> buckets_;  // [qlen · k]: expert · token blocks + block; -1: left out
  std::vector<int> offsets_;  // [num_experts · token blocks + 1]
  std::vector<PlanRow> rows_;
  std::vector<Job> jobs_;
  std::vector<MixRun> runs_;
  std::vector<int> mix_offsets_;  // [mixes + 1]
  std::vector<int> order_;        // tokens by mix
  int token_blocks_ = 0;
  int block_tokens_ = 0;
};

}  // namespace ktrt
