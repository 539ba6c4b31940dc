#include "moe/workspace.h"

#include <algorithm>

#include "base/check.h"
#include "moe/dispatch_plan.h"
#include "moe/expert_lora.h"

namespace ktrt {

namespace {

// Gate and up may both have the maximal rank.
constexpr std::size_t kInputRanks = 2 * ExpertLora::kMaxRank;

// Hands out consecutive parts of one allocation; measures when there is none.
class Carver {
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

// Bytes of rows, and of the output block.
struct Sizes {
  std::size_t job_rows, x_row, act_row, out;
};

Workspace::Thread carve(Carver& carver, const Sizes& size) {
  const std::size_t rows = size.job_rows;
  Workspace::Thread thread;
  thread.x = carver.take<std::uint16_t>(rows * size.x_row);
  thread.codes = carver.take<std::uint8_t>(rows * size.x_row);
  thread.scales = carver.take<float>(rows * sizeof(float));
  thread.t =
      carver.take<std::uint16_t>(rows * (kInputRanks + kShrunkPadding) * sizeof(std::uint16_t));
  thread.c = carver.take<float>(rows * kStripRows * sizeof(float));
  thread.c_up = carver.take<float>(rows * kStripRows * sizeof(float));
  thread.tile_x = carver.take<std::uint16_t>(kMaxTileRows * size.x_row);
  thread.tile_codes = carver.take<std::uint8_t>(kMaxTileRows * std::max(size.x_row, size.act_row));
  thread.out = carver.take<float>(size.out);
  return thread;
}

Workspace::Shared carve_shared(Carver& carver, std::size_t rows, std::size_t act_row) {
  Workspace::Shared shared;
  shared.act = carver.take<std::uint16_t>(rows * act_row);
  shared.codes = carver.take<std::uint8_t>(rows * act_row);
  shared.scales = carver.take<float>(rows * ExpertWeights::kMaxDownSlices * sizeof(float));
  shared.t = carver.take<std::uint16_t>(rows * (ExpertLora::kMaxRank + kShrunkPadding) *
                                        sizeof(std::uint16_t));
  shared.t_input = carver.take<std::uint16_t>(kSharedInputRows * (kInputRanks + kShrunkPadding) *
                                              sizeof(std::uint16_t));
  return shared;
}

// Bytes of a BF16 scratch row of `values`, padded for any weight format; more than enough for the
// INT8 codes of the same row.
std::size_t row_bytes(int values) {
  constexpr std::size_t kWidestTile = 128;
  return scratch_stride(round_up(static_cast<std::size_t>(values), kWidestTile) * 2);
}

}  // namespace

Workspace::Workspace(int num_threads, int max_qlen, int max_job_rows)
    : max_qlen_(max_qlen), max_job_rows_(max_job_rows) {
  KTRT_CHECK(max_qlen >= 1, "max_qlen is " << max_qlen << ", expected at least 1");
  threads_.resize(static_cast<std::size_t>(num_threads));
  thread_memory_.resize(threads_.size());
}

void Workspace::reserve(const MoeShape& shape) {
  // Rows of a plan, and of its padded tiles, are counted in int.
  constexpr std::int64_t kMaxPlanRows = std::int64_t{1} << 26;
  KTRT_CHECK(std::int64_t{max_qlen_} * shape.top_k <= kMaxPlanRows,
             "max_qlen " << max_qlen_ << " times top_k " << shape.top_k << ", expected at most "
                         << kMaxPlanRows << " rows in a forward");
  const std::size_t x_row = std::max(x_row_, row_bytes(shape.hidden_size));
  const std::size_t act_row = std::max(act_row_, row_bytes(shape.intermediate_size));
  const std::size_t plan_rows = std::max(
      plan_rows_, static_cast<std::size_t>(max_qlen_) * static_cast<std::size_t>(shape.top_k));
  const std::size_t out_column = static_cast<std::size_t>(max_qlen_) * sizeof(float);
  const std::size_t out_bytes =
      std::max(std::min(kOutputBlockBytes, out_column * x_row / 2), out_column * kStripRows);
  if (x_row != x_row_ || act_row != act_row_) {
    const auto job_rows = static_cast<std::size_t>(max_scratch_rows(max_job_rows_));
    const Sizes sizes{job_rows, x_row, act_row, out_bytes};
    for (std::size_t i = 0; i < threads_.size(); ++i) {
      Carver measure(nullptr);
      carve(measure, sizes);
      thread_memory_[i] = AlignedBuffer(measure.used());
      Carver carver(thread_memory_[i].as<std::byte>());
      threads_[i] = carve(carver, sizes);
    }
  }
  if (act_row != act_row_ || plan_rows != plan_rows_) {
    const auto rows = static_cast<std::size_t>(max_scratch_rows(static_cast<int>(plan_rows)));
    Carver measure(nullptr);
    carve_shared(measure, rows, act_row);
    shared_memory_ = AlignedBuffer(measure.used());
    Carver carver(shared_memory_.as<std::byte>());
    shared_ = carve_shared(carver, rows, act_row);
  }
  x_row_ = x_row;
  act_row_ = act_row;
  plan_rows_ = plan_rows;
}

void Workspace::release() {
  for (AlignedBuffer& memory : thread_memory_) memory.reset();
  shared_memory_.reset();
  std::fill(threads_.begin(), threads_.end(), Thread{});
  shared_ = Shared{};
  x_row_ = act_row_ = plan_rows_ = 0;
}

std::size_t Workspace::bytes() const {
  std::size_t bytes = shared_memory_.bytes();
  for (const AlignedBuffer& memory : thread_memory_) bytes += memory.bytes();
  return bytes;
}

std::atomic<int>* Workspace::job_counters(std::size_t count) {
  if (count > counter_capacity_) {
    counters_ = std::make_unique<std::atomic<int>[]>(count);
    counter_capacity_ = count;
  }
  for (std::size_t i = 0; i < count; ++i) counters_[i].store(0, std::memory_order_relaxed);
  return counters_.get();
}

}  // namespace ktrt
