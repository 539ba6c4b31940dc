#include "moe/workspace.h"

#include <algorithm>

#include "base/check.h"
#include "lora/expert_lora.h"
#include "moe/dispatch_plan.h"
#include "moe/expert_weights.h"

namespace ktrt {

namespace {

// Gate and up may both have the maximal rank.
constexpr int kInputRanks = 2 * ExpertLora::kMaxRank;

std::size_t shrunk_bytes(int ranks) {
  return static_cast<std::size_t>(ranks + kShrunkPadding) * sizeof(std::uint16_t);
}

// Bytes of a BF16 scratch row of `values`, padded for any weight format; more than enough for the
// INT8 codes of the same row.
std::size_t row_bytes(int values) {
  constexpr std::size_t kWidestTile = 128;
  return scratch_stride(round_up(static_cast<std::size_t>(values), kWidestTile) * 2);
}

// Rows that a forward computes, at most.
std::size_t plan_rows(const MoeShape& shape, int max_qlen) {
  // Rows are counted in int, padded tiles included.
  constexpr std::int64_t kMaxPlanRows = std::int64_t{1} << 26;
  const std::int64_t rows = std::int64_t{max_qlen} * shape.top_k;
  KTRT_CHECK(rows <= kMaxPlanRows, "max_qlen " << max_qlen << " times top_k " << shape.top_k
                                               << ", expected at most " << kMaxPlanRows
                                               << " rows in a forward");
  return static_cast<std::size_t>(max_scratch_rows(static_cast<int>(rows)));
}

std::size_t output_bytes(const MoeShape& shape, int max_qlen) {
  const std::size_t column = static_cast<std::size_t>(max_qlen) * sizeof(float);
  const std::size_t all = column * row_bytes(shape.hidden_size) / 2;
  return std::max(std::min(kOutputBlockBytes, all), column * kStripRows);
}

}  // namespace

// Hands out consecutive parts of one allocation; measures when there is none.
class Workspace::Carver {
 public:
  explicit Carver(std::byte* base) : base_(base) {}
  template <class T>
  T* take(std::size_t bytes) {
    T* part = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += round_up(bytes, kCacheLine);
    return part;
  }
  std::size_t used() const { return used_; }

 private:
  std::byte* base_;
  std::size_t used_ = 0;
};

Workspace::Thread Workspace::carve(Carver& carver, const Sizes& size) {
  const std::size_t rows = size.job_rows;
  Thread thread;
  thread.x = carver.take<std::uint16_t>(rows * size.x_row);
  thread.codes = carver.take<std::uint8_t>(rows * size.x_row);
  thread.scales = carver.take<float>(rows * sizeof(float));
  thread.t = carver.take<std::uint16_t>(rows * size.t_input_row);
  thread.c = carver.take<float>(rows * kStripRows * sizeof(float));
  thread.c_up = carver.take<float>(rows * kStripRows * sizeof(float));
  thread.tile_x = carver.take<std::uint16_t>(kMaxTileRows * size.x_row);
  thread.tile_codes = carver.take<std::uint8_t>(kMaxTileRows * std::max(size.x_row, size.act_row));
  thread.out = carver.take<float>(size.out);
  return thread;
}

Workspace::Shared Workspace::carve_shared(Carver& carver, const Sizes& size) {
  const std::size_t rows = size.plan_rows;
  Shared shared;
  shared.act = carver.take<std::uint16_t>(rows * size.act_row);
  shared.codes = carver.take<std::uint8_t>(rows * size.act_row);
  shared.scales = carver.take<float>(rows * ExpertWeights::kMaxDownSlices * sizeof(float));
  shared.t = carver.take<std::uint16_t>(rows * size.t_down_row);
  shared.t_input = carver.take<std::uint16_t>(kSharedInputRows * size.t_input_row);
  return shared;
}

Workspace::Workspace(Scratch& scratch, const MoeShape& shape, int num_threads, int max_qlen,
                     int max_job_rows)
    : max_job_rows_(max_job_rows),
      sizes_{static_cast<std::size_t>(max_scratch_rows(max_job_rows)),
             plan_rows(shape, max_qlen),
             row_bytes(shape.hidden_size),
             row_bytes(shape.intermediate_size),
             output_bytes(shape, max_qlen),
             shrunk_bytes(kInputRanks),
             shrunk_bytes(ExpertLora::kMaxRank)},
      threads_(static_cast<std::size_t>(num_threads)) {
  reserve(scratch);
}

void Workspace::reserve(Scratch& scratch) const {
  Carver thread(nullptr);
  carve(thread, sizes_);
  Carver shared(nullptr);
  carve_shared(shared, sizes_);
  scratch.reserve(thread.used(), shared.used());
}

void Workspace::place(Scratch& scratch, int input_ranks, int down_ranks) {
  const std::size_t input_row = shrunk_bytes(input_ranks);
  const std::size_t down_row = shrunk_bytes(down_ranks);
  if (input_row > sizes_.t_input_row || down_row > sizes_.t_down_row) {
    sizes_.t_input_row = std::max(sizes_.t_input_row, input_row);
    sizes_.t_down_row = std::max(sizes_.t_down_row, down_row);
    reserve(scratch);
    generation_ = 0;
  }
  if (generation_ == scratch.generation()) return;
  for (std::size_t i = 0; i < threads_.size(); ++i) {
    Carver carver(scratch.of_thread(i));
    threads_[i] = carve(carver, sizes_);
  }
  Carver carver(scratch.shared());
  shared_ = carve_shared(carver, sizes_);
  generation_ = scratch.generation();
}

}  // namespace ktrt
