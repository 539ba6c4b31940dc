// The tokens of one forward, grouped by expert.
#pragma once

#include <cstdint>
#include <vector>

#include "base/tensor_view.h"
#include "kernels/kernel_table.h"

namespace ktrt {

// One (token, slot) that an expert computes.
struct PlanRow {
  int token = 0;
  float weight = 0.0f;  // routing weight
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
};

// Rows that jobs of `rows` altogether may take in scratch memory.
constexpr int max_scratch_rows(int rows) { return rows + rows / kMaxTileRows; }

// Rows are sorted by expert, then token, then slot: the order in which a token's experts are
// summed, whatever the number of threads. Ids outside [0, num_experts) get no row.
class DispatchPlan {
 public:
  // For the down phase, tokens are cut into blocks in which an expert has four fifths of
  // max_job_rows rows on average: few experts then have more than max_job_rows, and two jobs.
  // expert_ids [qlen, k] int32 or int64, routing_weights [qlen, k] float; checked by the caller.
  void build(const TensorView& expert_ids, const TensorView& routing_weights, int num_experts,
             int max_job_rows);

  const std::vector<PlanRow>& rows() const { return rows_; }
  const std::vector<Job>& jobs() const { return jobs_; }
  // Tokens b · block_tokens() and on; the last block may have fewer.
  int token_blocks() const { return token_blocks_; }
  int block_tokens() const { return block_tokens_; }

 private:
  void cut_tokens(std::int64_t qlen, std::int64_t slots, int num_experts, int max_job_rows);

  std::vector<int> buckets_;  // [qlen · k]: expert · token blocks + block; -1: left out
  std::vector<int> offsets_;  // [num_experts · token blocks + 1]
  std::vector<PlanRow> rows_;
  std::vector<Job> jobs_;
  int token_blocks_ = 0;
  int block_tokens_ = 0;
};

}  // namespace ktrt
