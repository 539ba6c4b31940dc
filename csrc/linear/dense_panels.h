// X · Wᵀ for a row-major matrix W, by one thread for a range of output columns: how the range is
// cut, so that W is read from memory once and meets the rows of X in the caches.
//
// A range goes through in panels of W that fit the L2 cache: the blocks of rows of X that use a
// panel ask for the next one meanwhile. Every output is one dot product in one fixed order,
// whatever the cuts.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "engine/engine.h"
#include "engine/work_queue.h"
#include "kernels/kernel_table.h"

namespace ktrt {

inline constexpr int kMaxDenseBlockRows = 8;
inline constexpr int kMaxPanelColumns = 256;

// Rows, ranks or columns [begin, end).
struct DenseRange {
  std::int64_t begin, end;
};

// Value: std::uint16_t for BF16, or float. Kernel: the family's.
template <class Value, class Kernel>
class DensePanels {
 public:
  DensePanels(const Kernel& kernel, const Value* w, std::int64_t out, std::int64_t in)
      : kernel_(kernel), w_(w), out_(out), in_(in), part_of_k_(part_of_k(in)) {}

  // Y of all rows of x: on the engine's threads, or on the caller's alone where that is faster.
  // before(threads, thread) runs first on every thread; `has_before`: a barrier follows it.
  // epilogue.start(first, columns) is called before a panel, epilogue.finish(row, rows, first,
  // columns, c) with the complete C [rows][columns] of some rows; both from several threads.
  template <class Before, class Epilogue>
  void multiply(const Engine::Lease& lease, PieceQueue& queue, const Value* x, std::int64_t rows,
                bool has_before, const Before& before, const Epilogue& epilogue) const {
    ThreadPool& pool = lease.pool();
    std::byte* sums = nullptr;
    if (part_of_k_ < in_) {
      sums = lease.scratch().block(static_cast<std::size_t>(pool.size()) * kThreadSumBytes);
    }
    // In floating point: a few sizes at their limits multiply to more than 2^63.
    const double work = static_cast<double>(out_) * static_cast<double>(in_) *
                        static_cast<double>(kRowsPerRead + rows);
    if (work < kAloneBelow) {
      if (has_before) before(1, 0);
      compute({x, rows, sums}, {0, out_}, 0, epilogue);
      return;
    }
    const auto units = static_cast<int>((out_ + kUnitColumns - 1) / kUnitColumns);
    schedule_columns({0, units}, {.max_strips = units}, pool.size(), queue);
    pool.run([&](int thread) {
      if (has_before) {
        before(pool.size(), thread);
        pool.barrier();
      }
      while (const Piece* piece = queue.claim()) {
        compute({x, rows, sums},
                {std::int64_t{piece->first_strip} * kUnitColumns,
                 std::min(out_, std::int64_t{piece->end_strip} * kUnitColumns)},
                thread, epilogue);
      }
    });
  }

 private:
  // Threads claim multiples of this many output columns.
  static constexpr int kUnitColumns = 8;
  // A panel of W stays in the L2 cache, with the rows of x that pass over it and the next panel.
  static constexpr std::int64_t kPanelBytes = 256 << 10;
  static constexpr int kMinPanelColumns = 32;
  // Longer dot products are cut into parts of k, so that a block of rows of x and the weights that
  // it meets stay in the L1 cache; kGroupBlocks blocks take a part one after the other.
  static constexpr std::int64_t kPartBytes = 4096;
  static constexpr std::int64_t kPartOfK = kPartBytes / std::int64_t{sizeof(Value)};
  static constexpr std::int64_t kGroupBlocks = 8;
  static constexpr int kMaxPartColumns = 64;
  static_assert(kPanelBytes / kPartBytes <= kMaxPartColumns);
  static constexpr std::int64_t kBlockSumBytes =
      kMaxDenseBlockRows * kMaxPartColumns * kDenseSumBytes;
  static constexpr int kThreadSumBytes = kGroupBlocks * kBlockSumBytes;  // 256 KB: not for a stack
  // 32 KB of DeepSeek-V2-Lite: more than a core has under way, and a part of the L2 cache.
  static constexpr std::int64_t kColumnsAhead = 8;
  // Reading a value of W takes about as long as multiplying it with this many rows.
  static constexpr std::int64_t kRowsPerRead = 12;
  // Below this the caller is done before another thread has woken up: 256 KB for one row.
  static constexpr std::int64_t kAloneBelow =
      (256 << 10) / std::int64_t{sizeof(Value)} * (kRowsPerRead + 1);

  struct Task {
    const Value* x;
    std::int64_t rows;
    std::byte* sums;  // [threads] kThreadSumBytes; null where k is one part
  };
  struct Panel {
    std::int64_t first;
    int columns;
    std::uint8_t* sums;  // [kGroupBlocks] kBlockSumBytes, or null
  };
  // Columns [from, to) of W, for which some blocks of rows ask in equal shares: they come into the
  // L2 cache while others are used.
  struct Ask {
    std::int64_t from, to;
    DenseRange blocks;
  };

  // Parts of k: as few as possible, evenly filled.
  static std::int64_t part_of_k(std::int64_t k) {
    const std::int64_t parts = (k + kPartOfK - 1) / kPartOfK;
    return ((k + parts - 1) / parts + kDenseStep - 1) / kDenseStep * kDenseStep;
  }

  std::int64_t row_blocks(std::int64_t rows) const {
    return (rows + kernel_.block_rows - 1) / kernel_.block_rows;
  }

  std::int64_t panel_columns() const {
    const std::int64_t fitting =
        kPanelBytes / (in_ * std::int64_t{sizeof(Value)}) / kUnitColumns * kUnitColumns;
    return std::clamp<std::int64_t>(fitting, kMinPanelColumns, kMaxPanelColumns);
  }

  // All rows of a range of output columns.
  template <class Epilogue>
  void compute(const Task& task, DenseRange range, int thread, const Epilogue& epilogue) const {
    const std::int64_t columns = panel_columns();
    const std::int64_t blocks = row_blocks(task.rows);
    auto* const sums = reinterpret_cast<std::uint8_t*>(
        task.sums == nullptr ? nullptr : task.sums + thread * std::ptrdiff_t{kThreadSumBytes});
    for (std::int64_t n = range.begin; n < range.end; n += columns) {
      const std::int64_t end = std::min(n + columns, range.end);
      const Panel panel{n, static_cast<int>(end - n), sums};
      epilogue.start(n, panel.columns);
      std::int64_t block = 0;
      if (n == range.begin || blocks == 1) {
        // Nobody has asked for this panel, or a single block asks for columns as it goes.
        const std::int64_t last = blocks == 1 ? end + kColumnsAhead : end;
        const Ask own{std::min(n + kColumnsAhead, range.end), std::min(last, range.end), {0, 1}};
        compute_blocks(task, panel, {0, 1}, {0, in_}, own, epilogue);
        block = 1;
      }
      const Ask next{end, std::min(end + columns, range.end), {block, blocks}};
      for (; block < blocks; block += kGroupBlocks) {
        const DenseRange group{block, std::min(block + kGroupBlocks, blocks)};
        for (std::int64_t k = 0; k < in_; k += part_of_k_) {
          compute_blocks(task, panel, group, {k, std::min(k + part_of_k_, in_)}, next, epilogue);
        }
      }
    }
  }

  // Computes a part of k for some blocks of rows, and their outputs after the last part.
  template <class Epilogue>
  void compute_blocks(const Task& task, const Panel& panel, DenseRange blocks, DenseRange k,
                      const Ask& ask, const Epilogue& epilogue) const {
    const std::int64_t count = row_blocks(task.rows);
    float c[kMaxDenseBlockRows * kMaxPanelColumns];
    DotArgs<Value> dot{};
    dot.x_stride = dot.w_stride = in_;
    dot.w = w_ + panel.first * in_ + k.begin;
    dot.columns = panel.columns;
    dot.k = static_cast<int>(k.end - k.begin);
    dot.resume = k.begin > 0;
    dot.last = k.end == in_;
    dot.cold = count == 1;
    dot.c = c;
    dot.c_stride = panel.columns;
    for (std::int64_t block = blocks.begin; block < blocks.end; ++block) {
      const std::int64_t row = task.rows * block / count;
      dot.rows = static_cast<int>(task.rows * (block + 1) / count - row);
      dot.x = task.x + row * in_ + k.begin;
      if (panel.sums != nullptr) dot.sums = panel.sums + (block - blocks.begin) * kBlockSumBytes;
      const DenseRange bytes{asked(ask, block, k.begin), asked(ask, block, k.end)};
      dot.next = reinterpret_cast<const std::uint8_t*>(w_) + bytes.begin;
      dot.next_bytes = bytes.end - bytes.begin;
      kernel_.dot(dot);
      if (dot.last) epilogue.finish(row, dot.rows, panel.first, panel.columns, c);
    }
  }

  // Where in W, in bytes, the calls before this block's part of k from at_k on have asked to.
  std::int64_t asked(const Ask& ask, std::int64_t block, std::int64_t at_k) const {
    const auto column = in_ * std::int64_t{sizeof(Value)};
    const auto share = static_cast<double>((block - ask.blocks.begin) * in_ + at_k) /
                       static_cast<double>((ask.blocks.end - ask.blocks.begin) * in_);
    return ask.from * column +
           static_cast<std::int64_t>(share * static_cast<double>((ask.to - ask.from) * column));
  }

  const Kernel& kernel_;
  const Value* const w_;
  const std::int64_t out_, in_, part_of_k_;
};

}  // namespace ktrt
