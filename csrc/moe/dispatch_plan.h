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

// Consecutive plan rows of one expert: the unit whose activations stay in the L2 cache.
struct Job {
  int expert = 0;
  int first_row = 0;
  int rows = 0;
  // Its first row in scratch memory, where it has room for whole tiles of rows.
  int scratch_row = 0;
};

// Rows that jobs of `rows` altogether may take in scratch memory.
constexpr int max_scratch_rows(int rows) { return rows + rows / kMaxTileRows; }

// Rows are sorted by expert, then token, then slot: the order in which a token's experts are
// summed, whatever the number of threads. Ids outside [0, num_experts) get no row.
class DispatchPlan {
 public:
  // expert_ids [qlen, k] int32 or int64, routing_weights [qlen, k] float; checked by the caller.
  void build(const TensorView& expert_ids, const TensorView& routing_weights, int num_experts,
             int max_job_rows);

  const std::vector<PlanRow>& rows() const { return rows_; }
  const std::vector<Job>& jobs() const { return jobs_; }

 private:
  std::vector<int> ids_;      // [qlen · k], -1 for a slot that is left out
  std::vector<int> offsets_;  // [num_experts + 1]
  std::vector<PlanRow> rows_;
  std::vector<Job> jobs_;
};

}  // namespace ktrt
