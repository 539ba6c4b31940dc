#include "linear/dense_linear.h"

#include <algorithm>
#include <cstddef>
#include <vector>

#include "base/bf16.h"
#include "base/check.h"
#include "engine/weight_args.h"
#include "linear/linear_args.h"
#include "lora/check_lora.h"

namespace ktrt {

namespace {

// Threads claim multiples of this many output columns.
constexpr int kUnitColumns = 8;
// A panel of W stays in the L2 cache, with the rows of x that pass over it and the next panel.
constexpr std::int64_t kPanelBytes = 256 << 10;
constexpr int kMinPanelColumns = 32;
constexpr int kMaxPanelColumns = 256;
constexpr int kMaxBlockRows = 8;
// Longer dot products are cut into parts of k, so that a block of rows of x and the weights that it
// meets stay in the L1 cache; kGroupBlocks blocks take a part one after the other.
constexpr std::int64_t kPartOfK = 2048;
constexpr std::int64_t kGroupBlocks = 8;
constexpr int kMaxPartColumns = 64;
constexpr std::int64_t kBlockSumBytes = kMaxBlockRows * kMaxPartColumns * kDenseSumBytes;
constexpr int kThreadSumBytes = kGroupBlocks * kBlockSumBytes;  // 256 KB: too much for a stack
static_assert(kPanelBytes / (kPartOfK * 2) <= kMaxPartColumns);
constexpr std::int64_t kLineValues = 32;
constexpr std::int64_t kBlocksToAsk = 3;
// Reading a value of W takes about as long as multiplying it with this many rows.
constexpr std::int64_t kRowsPerRead = 12;
// Below this the caller is done before another thread has woken up: 256 KB for one row.
constexpr std::int64_t kAloneBelow = (128 << 10) * (kRowsPerRead + 1);

// Parts of k: as few as possible, evenly filled.
std::int64_t part_of_k(std::int64_t k) {
  const std::int64_t parts = (k + kPartOfK - 1) / kPartOfK;
  return ((k + parts - 1) / parts + kDenseStep - 1) / kDenseStep * kDenseStep;
}

// Shrunk rows of the forward that runs; its caller's, so that it is allocated once.
std::uint16_t* shrunk_rows(std::size_t count) {
  thread_local std::vector<std::uint16_t> rows;
  rows.assign(count, 0);
  return rows.data();
}

}  // namespace

struct DenseLinear::Task {
  const std::uint16_t* x;
  std::int64_t rows;
  std::uint16_t* out;
  std::uint16_t* t;       // BF16 [rows][2·rank_pairs]
  std::int64_t t_stride;  // 0 without LoRA
  std::byte* sums;        // [threads] kThreadSumBytes; null where k is one part
};

struct DenseLinear::Panel {
  std::int64_t first;
  int columns;
  std::int64_t next_bytes;  // of W after the panel, to be prefetched
  std::uint8_t* sums;       // [kGroupBlocks] kBlockSumBytes, or null
  DenseFinishArgs finish;   // except for the rows
};

DenseLinear::DenseLinear(std::shared_ptr<Engine> engine, const TensorView& weight,
                         const std::optional<TensorView>& bias)
    : engine_(std::move(engine)) {
  KTRT_CHECK(engine_ != nullptr, "engine is missing");
  check_weight(weight);
  out_ = weight.shape[0];
  in_ = weight.shape[1];
  weight_ = static_cast<const std::uint16_t*>(weight.data);
  part_of_k_ = part_of_k(in_);
  bias_ = copy_floats(bias, out_, out_);
}

void DenseLinear::load_lora(int number, const TensorView& a, const TensorView& b) {
  check_lora(a, b, in_, out_, kMaxRank);
  Lora lora;
  lora.rank = static_cast<int>(a.shape[0]);
  lora.rank_pairs = (lora.rank + 1) / 2;
  lora.a = AlignedBuffer(static_cast<std::size_t>(lora.rank * in_) * sizeof(bf16_t));
  for (int r = 0; r < lora.rank; ++r) {
    const auto* row = reinterpret_cast<const float*>(a.row(r));
    std::transform(row, row + in_, lora.a.as<bf16_t>() + r * in_, f32_to_bf16);
  }
  lora.b = AlignedBuffer(static_cast<std::size_t>(2 * lora.rank_pairs * out_) * sizeof(bf16_t));
  for (std::int64_t n = 0; n < out_; ++n) {
    const auto* row = reinterpret_cast<const float*>(b.row(n));
    for (int r = 0; r < lora.rank; ++r) {
      lora.b.as<bf16_t>()[(r / 2 * out_ + n) * 2 + r % 2] = f32_to_bf16(row[r]);
    }
  }
  const auto lease = engine_->lease();
  loras_.put(number, std::make_shared<const Lora>(std::move(lora)));
}

void DenseLinear::unload_lora(int number) {
  const auto lease = engine_->lease();
  loras_.remove(number);
}

void DenseLinear::activate_loras(std::span<const int> numbers, std::span<const float> weights) {
  const auto lease = engine_->lease();
  loras_.activate(numbers, weights);
}

std::int64_t DenseLinear::row_blocks(std::int64_t rows) const {
  const int most = engine_->kernels().dense_bf16->block_rows;
  return (rows + most - 1) / most;
}

int DenseLinear::panel_columns() const {
  const std::int64_t fitting = kPanelBytes / (in_ * 2) / kUnitColumns * kUnitColumns;
  return static_cast<int>(std::clamp<std::int64_t>(fitting, kMinPanelColumns, kMaxPanelColumns));
}

// Ranks [first_rank, end_rank) of T for rows [first_row, end_row).
void DenseLinear::shrink(const Task& task, Range rows, Range ranks) const {
  const DenseKernel& kernel = *engine_->kernels().dense_bf16;
  float c[kMaxBlockRows * kMaxPanelColumns];
  for (std::int64_t row = rows.begin; row < rows.end; row += kernel.block_rows) {
    for (std::int64_t rank = ranks.begin; rank < ranks.end; rank += kMaxPanelColumns) {
      DenseDotArgs dot{};
      dot.x = task.x + row * in_;
      dot.x_stride = dot.w_stride = in_;
      dot.last = true;
      dot.rows = static_cast<int>(std::min<std::int64_t>(kernel.block_rows, rows.end - row));
      dot.w = loras_.active()->a.as<std::uint16_t>() + rank * in_;
      dot.columns = static_cast<int>(std::min<std::int64_t>(kMaxPanelColumns, ranks.end - rank));
      dot.k = static_cast<int>(in_);
      dot.cold = row == rows.begin;
      dot.c = c;
      dot.c_stride = dot.columns;
      kernel.dot(dot);
      DenseFinishArgs finish{};
      finish.c = c;
      finish.c_stride = dot.columns;
      finish.rows = dot.rows;
      finish.columns = dot.columns;
      finish.out = task.t + row * task.t_stride + rank;
      finish.out_stride = task.t_stride;
      kernel.finish(finish);
    }
  }
}

// Arguments for these output columns, except for the rows and their C.
DenseFinishArgs DenseLinear::finish_args(const Task& task, std::int64_t first, int columns) const {
  DenseFinishArgs finish{};
  finish.columns = columns;
  finish.bias = bias_.empty() ? nullptr : bias_.as<float>() + first;
  finish.out_stride = out_;
  if (task.t_stride == 0) return finish;
  finish.lora_b = loras_.active()->b.as<std::uint16_t>() + 2 * first;
  finish.b_stride = out_;
  finish.rank_pairs = loras_.active()->rank_pairs;
  finish.t_stride = task.t_stride;
  // B is read after the panel, and lies elsewhere.
  for (int pair = 0; pair < finish.rank_pairs; ++pair) {
    const std::uint16_t* b = finish.lora_b + 2 * pair * out_;
    for (int i = 0; i < 2 * columns; i += kLineValues) __builtin_prefetch(b + i, 0, 2);
  }
  return finish;
}

// All rows of a range of output columns.
void DenseLinear::compute(const Task& task, Range range, int thread) const {
  const std::int64_t columns = panel_columns();
  const std::int64_t blocks = row_blocks(task.rows);
  // The next panel comes into the cache while this one is used: every block of rows prefetches a
  // share. A few blocks have no time for that and read each panel from memory as they go.
  const bool ask = blocks >= kBlocksToAsk;
  auto* const sums = reinterpret_cast<std::uint8_t*>(
      task.sums == nullptr ? nullptr : task.sums + thread * std::ptrdiff_t{kThreadSumBytes});
  bool cold = true;
  for (std::int64_t n = range.begin; n < range.end; n += columns) {
    const auto count = static_cast<int>(std::min(columns, range.end - n));
    const std::int64_t coming = std::min(columns, range.end - n - count);
    const Panel panel{n, count, ask ? coming * in_ * 2 : 0, sums, finish_args(task, n, count)};
    if (cold) compute_blocks(task, panel, {0, 1}, {0, in_}, true);
    for (std::int64_t block = cold; block < blocks; block += kGroupBlocks) {
      const Range group{block, std::min(block + kGroupBlocks, blocks)};
      for (std::int64_t k = 0; k < in_; k += part_of_k_) {
        compute_blocks(task, panel, group, {k, std::min(k + part_of_k_, in_)}, false);
      }
    }
    cold = !ask;
  }
}

// Computes a part of k for some blocks of rows, and their outputs after the last part.
void DenseLinear::compute_blocks(const Task& task, const Panel& panel, Range blocks, Range k,
                                 bool cold) const {
  const DenseKernel& kernel = *engine_->kernels().dense_bf16;
  const std::int64_t count = row_blocks(task.rows);
  float c[kMaxBlockRows * kMaxPanelColumns];
  DenseDotArgs dot{};
  dot.x_stride = dot.w_stride = in_;
  dot.w = weight_ + panel.first * in_ + k.begin;
  dot.columns = panel.columns;
  dot.k = static_cast<int>(k.end - k.begin);
  dot.cold = cold;
  dot.resume = k.begin > 0;
  dot.last = k.end == in_;
  dot.c = c;
  dot.c_stride = panel.columns;
  DenseFinishArgs finish = panel.finish;
  finish.c = c;
  finish.c_stride = panel.columns;
  // Bytes of the next panel that the calls so far have prefetched.
  const auto asked = [&](std::int64_t block, std::int64_t at_k) {
    return panel.next_bytes / count * block + panel.next_bytes / count * at_k / in_;
  };
  for (std::int64_t block = blocks.begin; block < blocks.end; ++block) {
    const std::int64_t row = task.rows * block / count;
    dot.rows = static_cast<int>(task.rows * (block + 1) / count - row);
    dot.x = task.x + row * in_ + k.begin;
    if (panel.sums != nullptr) dot.sums = panel.sums + (block - blocks.begin) * kBlockSumBytes;
    dot.next =
        reinterpret_cast<const std::uint8_t*>(weight_ + (panel.first + panel.columns) * in_) +
        asked(block, k.begin);
    dot.next_bytes = asked(block, k.end) - asked(block, k.begin);
    kernel.dot(dot);
    if (!dot.last) continue;
    finish.rows = dot.rows;
    finish.t = task.t + row * task.t_stride;
    finish.out = task.out + row * out_ + panel.first;
    kernel.finish(finish);
  }
}

void DenseLinear::forward(const std::uint16_t* x, std::int64_t x_count, std::uint16_t* out,
                          std::int64_t out_count) {
  const std::int64_t rows = check_rows(x, x_count, out, out_count, in_, out_);
  if (rows == 0) return;
  const auto lease = engine_->lease();
  ThreadPool& pool = lease.pool();
  Task task{x, rows, out, nullptr, 0, nullptr};
  if (part_of_k_ < in_) {
    task.sums = lease.scratch().block(static_cast<std::size_t>(pool.size()) * kThreadSumBytes);
  }
  if (loras_.active() != nullptr) {
    task.t_stride = 2 * loras_.active()->rank_pairs;
    task.t = shrunk_rows(static_cast<std::size_t>(rows * task.t_stride));
  }
  // In floating point: a few sizes at their limits multiply to more than 2^63.
  const double work = static_cast<double>(out_) * static_cast<double>(in_) *
                      static_cast<double>(kRowsPerRead + rows);
  if (work < kAloneBelow) {
    if (loras_.active() != nullptr) shrink(task, {0, rows}, {0, loras_.active()->rank});
    compute(task, {0, out_}, 0);
    return;
  }
  const auto units = static_cast<int>((out_ + kUnitColumns - 1) / kUnitColumns);
  schedule_columns({0, units}, {.max_strips = units}, pool.size(), queue_);
  pool.run([&](int thread) {
    if (loras_.active() != nullptr) {
      const auto share = [&](std::int64_t count) {
        return Range{count * thread / pool.size(), count * (thread + 1) / pool.size()};
      };
      const bool by_rows = rows >= 2 * pool.size();
      shrink(task, by_rows ? share(rows) : Range{0, rows},
             by_rows ? Range{0, loras_.active()->rank} : share(loras_.active()->rank));
      pool.barrier();
    }
    while (const Piece* piece = queue_.claim()) {
      compute(task,
              {std::int64_t{piece->first_strip} * kUnitColumns,
               std::min(out_, std::int64_t{piece->end_strip} * kUnitColumns)},
              thread);
    }
  });
}

}  // namespace ktrt
