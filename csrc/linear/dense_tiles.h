// X · Wᵀ for many rows of X and a row-major BF16 matrix W on AMX tiles: rows of X are copied into
// the tiles' order, strips of 32 rows of W are claimed, and made into tiles as they are multiplied
// (kernels/dense_tiles).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/aligned_buffer.h"
#include "engine/engine.h"
#include "engine/work_queue.h"
#include "kernels/kernel_table.h"

namespace ktrt {

// The LoRAs of all rows: their sum on the tiles too.
struct DenseTileLora {
  struct Part {
    const std::uint16_t* a;  // BF16 [rank][in]
    const std::uint16_t* b;  // BF16 [rank_pairs][out][2]
    int rank, rank_pairs;
    float weight;
  };
  std::vector<Part> parts;
  int rank_pairs;  // of all parts
  // BF16 [whole tiles of rows][t_stride]: the parts' ranks one after the other, then zeros up to a
  // multiple of 32.
  std::uint16_t* t;
  std::int64_t t_stride;
};

class DenseTiles {
 public:
  // Whether rows of `in` values are multiplied here.
  static bool take(const KernelTable& kernels, std::int64_t rows, std::int64_t in) {
    return kernels.dense_tiles != nullptr && rows >= kernels.dense_tiles_from &&
           in % kTileValues == 0 && in <= kMaxIn;
  }

  DenseTiles(const KernelTable& kernels, const std::uint16_t* w, std::int64_t out, std::int64_t in)
      : kernels_(kernels), w_(w), out_(out), in_(in) {}

  // As DensePanels::multiply, but epilogue.finish(row, rows, first, columns, c, c_stride), and
  // lora: what C has before, or null.
  template <class Before, class Epilogue>
  void multiply(const Engine::Lease& lease, PieceQueue& queue, const std::uint16_t* x,
                std::int64_t rows, const DenseTileLora* lora, const Before& before,
                const Epilogue& epilogue) const {
    const std::int64_t most = std::max(kPassBytes / row_bytes(), kMaxBlockRows);
    const std::int64_t passes = (rows + most - 1) / most;
    for (std::int64_t pass = 0; pass < passes; ++pass) {
      const std::int64_t first = rows * pass / passes;
      const std::int64_t end = rows * (pass + 1) / passes;
      const Task task = make_task(lease, x, first, end - first, lora);
      multiply_pass(
          lease.pool(), queue, task,
          [&](int threads, int thread) {
            if (pass == 0) before(threads, thread);
          },
          epilogue);
    }
  }

 private:
  static constexpr std::int64_t kColumns = 32;
  static constexpr std::int64_t kTileValues = 32;
  static constexpr std::int64_t kMaxIn = 1 << 22;  // the kernel's counts of bytes and tiles are int
  static constexpr std::int64_t kPairBytes = kColumns * 2 * std::int64_t{sizeof(std::uint16_t)};
  // Rows of X that pass over a strip stay in the L2 cache; few would not be worth making tiles.
  static constexpr std::int64_t kBlockBytes = 3 << 19;
  static constexpr std::int64_t kMinBlockRows = 128;
  static constexpr std::int64_t kMaxBlockRows = 512;
  static constexpr std::int64_t kBlockSumBytes =
      kMaxBlockRows * kColumns * std::int64_t{sizeof(float)};
  // Tiles of rows that are shrunk by one thread: the more, the fewer times A is made into tiles.
  static constexpr std::int64_t kShrinkTiles = 4;

  // Bytes of X that are copied at a time: the engine keeps the memory.
  static constexpr std::int64_t kPassBytes = 16 << 20;

  struct Task {
    const std::uint16_t* x;
    std::int64_t first_row, rows;
    std::int64_t blocks;       // of rows
    std::int64_t block_tiles;  // tiles of a block, at most
    std::int64_t row_stride;   // bytes
    std::uint8_t* tiles;       // [blocks][block_tiles][kMaxTileRows] rows
    std::byte* of_threads;     // a block's C, and a strip's B of the LoRA
    std::int64_t thread_bytes;
    const DenseTileLora* lora;
  };
  struct Block {
    std::int64_t row;  // of X
    int rows, tile_rows;
  };

  std::int64_t row_bytes() const { return in_ * std::int64_t{sizeof(std::uint16_t)}; }

  template <class Before, class Epilogue>
  void multiply_pass(ThreadPool& pool, PieceQueue& queue, const Task& task, const Before& before,
                     const Epilogue& epilogue) const {
    const std::int64_t tiles = task.blocks * task.block_tiles;
    const std::int64_t shrinks = task.lora == nullptr ? 0 : task.blocks * shrinks_of_block(task);
    const auto strips = static_cast<int>((out_ + kColumns - 1) / kColumns);
    schedule_columns({0, strips}, {.max_strips = strips}, pool.size(), queue);
    std::atomic<std::int64_t> next_tile{0};
    std::atomic<std::int64_t> next_shrink{0};
    pool.run([&](int thread) {
      before(pool.size(), thread);
      for (auto tile = next_tile++; tile < tiles; tile = next_tile++) gather(task, tile);
      pool.barrier();
      std::byte* const memory = task.of_threads + thread * task.thread_bytes;
      auto* const c = reinterpret_cast<float*>(memory);
      if (shrinks > 0) {
        for (auto i = next_shrink++; i < shrinks; i = next_shrink++) shrink(task, i, c);
        pool.barrier();
      }
      auto* const lora_b = reinterpret_cast<std::uint16_t*>(memory + kBlockSumBytes);
      while (const Piece* piece = queue.claim()) compute(task, *piece, c, lora_b, epilogue);
    });
  }

  Task make_task(const Engine::Lease& lease, const std::uint16_t* x, std::int64_t first_row,
                 std::int64_t rows, const DenseTileLora* lora) const {
    Task task{};
    task.x = x;
    task.first_row = first_row;
    task.rows = rows;
    task.lora = lora;
    const std::int64_t most = std::clamp(kBlockBytes / row_bytes(), kMinBlockRows, kMaxBlockRows);
    task.blocks = (rows + most - 1) / most;
    const std::int64_t block_rows = (rows + task.blocks - 1) / task.blocks;
    task.block_tiles = (block_rows + kMaxTileRows - 1) / kMaxTileRows;
    task.row_stride =
        static_cast<std::int64_t>(scratch_stride(static_cast<std::size_t>(row_bytes())));
    const std::int64_t tile_bytes = task.blocks * task.block_tiles * kMaxTileRows * task.row_stride;
    task.thread_bytes = kBlockSumBytes + (lora == nullptr ? 0 : lora->rank_pairs * kPairBytes);
    std::byte* const memory = lease.scratch().block(
        static_cast<std::size_t>(tile_bytes + lease.pool().size() * task.thread_bytes));
    task.tiles = reinterpret_cast<std::uint8_t*>(memory);
    task.of_threads = memory + tile_bytes;
    return task;
  }

  Block block(const Task& task, std::int64_t index) const {
    const std::int64_t row = task.rows * index / task.blocks;
    const auto count = static_cast<int>(task.rows * (index + 1) / task.blocks - row);
    return {task.first_row + row, count, kernels_.dense_tiles->tile_rows(count)};
  }

  std::uint8_t* tiles_of(const Task& task, std::int64_t index) const {
    return task.tiles + index * task.block_tiles * kMaxTileRows * task.row_stride;
  }

  void gather(const Task& task, std::int64_t tile) const {
    const std::int64_t index = tile / task.block_tiles;
    const Block rows = block(task, index);
    const int first = static_cast<int>(tile % task.block_tiles) * rows.tile_rows;
    if (first >= rows.rows) return;
    const int count = std::min(rows.tile_rows, rows.rows - first);
    const std::uint8_t* from[kMaxTileRows];
    for (int r = 0; r < count; ++r) {
      from[r] = reinterpret_cast<const std::uint8_t*>(task.x + (rows.row + first + r) * in_);
    }
    const auto bytes = static_cast<int>(row_bytes());
    kernels_.elementwise->to_tile(from, count, rows.tile_rows, bytes, bytes,
                                  tiles_of(task, index) + first * task.row_stride);
  }

  std::int64_t shrinks_of_block(const Task& task) const {
    std::int64_t strips = 0;
    for (const DenseTileLora::Part& part : task.lora->parts) {
      strips += (part.rank + kColumns - 1) / kColumns;
    }
    return strips * ((task.block_tiles + kShrinkTiles - 1) / kShrinkTiles);
  }

  // Some tiles of rows times up to 32 ranks of a part.
  void shrink(const Task& task, std::int64_t unit, float* c) const {
    const std::int64_t each = shrinks_of_block(task);
    const std::int64_t groups = (task.block_tiles + kShrinkTiles - 1) / kShrinkTiles;
    const Block rows = block(task, unit / each);
    const std::int64_t first_row = unit % groups * kShrinkTiles * rows.tile_rows;
    if (first_row >= rows.rows) return;
    std::int64_t strip = unit % each / groups;
    std::int64_t offset = 0;
    const DenseTileLora::Part* part = task.lora->parts.data();
    for (; strip >= (part->rank + kColumns - 1) / kColumns; ++part) {
      strip -= (part->rank + kColumns - 1) / kColumns;
      offset += 2 * part->rank_pairs;
    }
    const std::int64_t rank = strip * kColumns;
    GemmArgs args = row_args(task, unit / each, rows, first_row);
    args.rows = static_cast<int>(std::min(kShrinkTiles * rows.tile_rows, rows.rows - first_row));
    args.w_block = reinterpret_cast<const std::uint8_t*>(part->a + rank * in_);
    args.block_rows = static_cast<int>(std::min(kColumns, part->rank - rank));
    args.c = c;
    kernels_.dense_tiles->strip(args);
    for (int r = 0; r < args.rows; ++r, c += kColumns) {
      for (int i = 0; part->weight != 1.0f && i < args.block_rows; ++i) c[i] *= part->weight;
      std::uint16_t* const t = task.lora->t + (rows.row + first_row + r) * task.lora->t_stride;
      kernels_.elementwise->f32_to_bf16(c, args.block_rows, t + offset + rank);
    }
  }

  // Rows of a block from first_row on, the first one of a tile.
  GemmArgs row_args(const Task& task, std::int64_t index, const Block& rows,
                    std::int64_t first_row) const {
    GemmArgs args{};
    args.a = tiles_of(task, index) + first_row * task.row_stride;
    args.a_stride = rows.tile_rows * task.row_stride;
    args.tile_rows = rows.tile_rows;
    args.cold_rows = true;
    args.rows = rows.rows;
    args.k = static_cast<int>(in_);
    return args;
  }

  // All rows of a range of strips.
  template <class Epilogue>
  void compute(const Task& task, const Piece& piece, float* c, std::uint16_t* lora_b,
               const Epilogue& epilogue) const {
    for (std::int64_t index = 0; index < task.blocks; ++index) {
      const Block rows = block(task, index);
      GemmArgs args = row_args(task, index, rows, 0);
      args.c = c;
      if (task.lora != nullptr) {
        args.lora_b = lora_b;
        args.rank_pairs = task.lora->rank_pairs;
        args.t = task.lora->t + rows.row * task.lora->t_stride;
        args.t_stride = task.lora->t_stride;
      }
      for (int strip = piece.first_strip; strip < piece.end_strip; ++strip) {
        const std::int64_t first = strip * kColumns;
        const std::uint16_t* const w = w_ + first * in_;
        args.block_rows = static_cast<int>(std::min(kColumns, out_ - first));
        args.w_block = reinterpret_cast<const std::uint8_t*>(w);
        args.next = strip + 1 < piece.end_strip
                        ? reinterpret_cast<const std::uint8_t*>(w + kColumns * in_)
                        : nullptr;
        if (task.lora != nullptr) copy_strip(*task.lora, first, args.block_rows, lora_b);
        epilogue.start(first, args.block_rows);
        kernels_.dense_tiles->strip(args);
        epilogue.finish(rows.row, rows.rows, first, args.block_rows, c, kColumns);
      }
    }
  }

  // The LoRA's B of one strip, as ExpandArgs has it.
  void copy_strip(const DenseTileLora& lora, std::int64_t first, int columns,
                  std::uint16_t* to) const {
    for (const DenseTileLora::Part& part : lora.parts) {
      for (int pair = 0; pair < part.rank_pairs; ++pair, to += 2 * kColumns) {
        const std::uint16_t* const from = part.b + (pair * out_ + first) * 2;
        std::fill(std::copy_n(from, 2 * columns, to), to + 2 * kColumns, std::uint16_t{0});
      }
    }
  }

  const KernelTable& kernels_;
  const std::uint16_t* const w_;
  const std::int64_t out_, in_;
};

}  // namespace ktrt
