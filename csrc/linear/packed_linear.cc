#include "linear/packed_linear.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "base/bf16.h"
#include "base/check.h"
#include "engine/weight_args.h"
#include "linear/linear_args.h"
#include "lora/check_lora.h"

namespace ktrt {

namespace {

static_assert(255 * 127 * PackedLinear::kMaxIn <= std::numeric_limits<std::int32_t>::max());

// Codes of the rows that pass over a range of strips: half of a small L2 cache.
constexpr std::int64_t kBlockBytes = 512 << 10;
// Whole tiles; their C of one strip is 40 KB.
constexpr std::int64_t kMaxBlockRows = 320;
// Reading a value of W takes about as long as multiplying it with this many rows.
constexpr std::int64_t kRowsPerRead = 12;
// Below this the caller is done before another thread has woken up: 256 KB for one row.
constexpr std::int64_t kAloneBelow = (256 << 10) * (kRowsPerRead + 1);
// Up to this many rows, LoRA's A is read by several threads, a block of ranks each.
constexpr std::int64_t kRowsToSplitRanks = kMaxTileRows;

// The rows of one forward, as the kernels read them; its caller's, so that they are allocated once.
struct RowMemory {
  AlignedBuffer codes;
  std::vector<float> scales;
  std::vector<std::uint16_t> t;
};

RowMemory& row_memory() {
  thread_local RowMemory memory;
  return memory;
}

// `count` values that belong to the calling thread.
template <class T>
T* thread_values(std::size_t count) {
  thread_local std::vector<T> values;
  if (values.size() < count) values.resize(count);
  return values.data();
}

TensorView as_expert(TensorView matrix) {
  return {.name = matrix.name,
          .data = matrix.data,
          .dtype = matrix.dtype,
          .ndim = 3,
          .shape = {1, matrix.shape[0], matrix.shape[1]},
          .stride = {matrix.shape[0] * matrix.stride[0], matrix.stride[0], matrix.stride[1]}};
}

}  // namespace

// Consecutive rows, and their place in scratch memory.
struct PackedLinear::Block {
  std::int64_t row;
  int rows;
  std::int64_t scratch_row;
  int tile_rows;  // 1: row-major
};

struct PackedLinear::Task {
  const std::uint16_t* x;
  std::int64_t rows;
  std::uint16_t* out;
  const GemmKernel* gemm;
  std::int64_t blocks;       // of rows
  std::int64_t block_tiles;  // a block's room in scratch memory, in tiles of kMaxTileRows
  std::uint8_t* codes;
  std::int64_t code_stride;  // bytes of a row
  float* scales;
  std::uint16_t* t;       // null where no row has LoRA
  std::int64_t t_stride;  // elements
  // The LoRA of all rows, at most one at a time: the strips add it. Else each row's is added after.
  const Loras::Part* fused;
  float* c;  // [threads][kMaxBlockRows][kStripRows]

  Block block(std::int64_t index) const;
};

PackedLinear::PackedLinear(std::shared_ptr<Engine> engine, const TensorView& weight,
                           const std::optional<TensorView>& bias)
    : engine_(std::move(engine)) {
  KTRT_CHECK(engine_ != nullptr, "engine is missing");
  check_weight(weight);
  KTRT_CHECK(weight.shape[1] <= kMaxIn, weight.name << " has rows of " << weight.shape[1]
                                                    << ", expected at most " << kMaxIn
                                                    << " for exact sums in INT8");
  const PackedLayout layout(WeightFormat::kInt8, static_cast<int>(weight.shape[0]),
                            static_cast<int>(weight.shape[1]));
  make_base(layout, weight.name, bias, [&](int strip, const PackedMatrix& matrix) {
    return pack_strip(weight, matrix, strip);
  });
}

PackedLinear::PackedLinear(std::shared_ptr<Engine> engine, WeightFormat format,
                           const CodedSource& weight, std::int64_t in,
                           const std::optional<TensorView>& bias)
    : engine_(std::move(engine)) {
  KTRT_CHECK(engine_ != nullptr, "engine is missing");
  weight.codes.expect_shape({-1, -1});
  const std::int64_t out = weight.codes.shape[0];
  constexpr std::int64_t kMostRows = 1 << 30;
  KTRT_CHECK(out >= 1 && out <= kMostRows && in >= 1 && in <= kMaxIn,
             weight.codes.name << " has " << out << " rows, in_features is " << in
                               << ", expected 1 to 2^30 and 1 to " << kMaxIn);
  check_coded(weight, format, static_cast<int>(out), static_cast<int>(in));
  const PackedLayout layout(format, static_cast<int>(out), static_cast<int>(in));
  make_base(layout, weight.codes.name, bias, [&](int strip, const PackedMatrix& matrix) {
    return pack_coded_strip(weight, 0, matrix, strip);
  });
}

template <class Pack>
void PackedLinear::make_base(const PackedLayout& layout, const std::string& name,
                             const std::optional<TensorView>& bias, const Pack& pack) {
  Base base;
  base.bias = copy_floats(bias, layout.n(), layout.padded_n());
  base.codes = AlignedBuffer(layout.code_bytes());
  if (layout.scale_bytes() > 0) base.scales = AlignedBuffer(layout.scale_bytes());
  if (layout.sum_bytes() > 0) base.sums = AlignedBuffer(layout.sum_bytes());
  base.matrix = {layout, base.codes.as<std::uint8_t>(), base.scales.as<float>(),
                 base.sums.as<std::int32_t>()};
  const auto lease = engine_->lease();
  std::atomic<int> next{0};
  std::atomic<bool> finite{true};
  lease.pool().run([&](int) {
    for (int strip = next++; strip < layout.strips(); strip = next++) {
      if (!pack(strip, base.matrix)) finite.store(false, std::memory_order_relaxed);
    }
  });
  KTRT_CHECK(finite.load(), name << " holds NaN or infinity; the weights are damaged");
  base_ = std::make_unique<const Base>(std::move(base));
}

std::size_t PackedLinear::packed_bytes() const {
  const PackedLayout& layout = base_->matrix.layout;
  return layout.code_bytes() + layout.scale_bytes() + layout.sum_bytes();
}

void PackedLinear::load_lora(int number, const TensorView& a, const TensorView& b) {
  check_lora(a, b, in_features(), out_features(), kMaxRank);
  put_lora(number, {as_expert(a), as_expert(b)});
}

void PackedLinear::load_empty_lora(int number) { put_lora(number, {}); }

// The matrix is the only expert's up projection.
void PackedLinear::put_lora(int number, const LoraPair& pair) {
  const MoeShape shape{.num_experts = 1,
                       .top_k = 1,
                       .hidden_size = base_->matrix.layout.k(),
                       .intermediate_size = base_->matrix.layout.n(),
                       .has_gate = false};
  auto lora = std::make_shared<const ExpertLora>(shape, LoraPair{}, pair, LoraPair{});
  const auto lease = engine_->lease();
  loras_.put(number, std::move(lora));
}

void PackedLinear::unload_lora(int number) {
  const auto lease = engine_->lease();
  loras_.remove(number);
}

void PackedLinear::activate_loras(std::span<const int> numbers, std::span<const float> weights) {
  const auto lease = engine_->lease();
  loras_.activate(numbers, weights);
}

std::size_t PackedLinear::lora_bytes() const {
  const auto lock = engine_->lock();
  return loras_.bytes();
}

// Scratch memory for all rows, as the kernel reads them.
PackedLinear::Task PackedLinear::make_task(const std::uint16_t* x, std::int64_t rows,
                                           std::uint16_t* out) const {
  const std::int64_t row_bytes =
      std::int64_t{base_->matrix.layout.padded_k()} * (quantizes_rows(format()) ? 1 : 2);
  const std::int64_t most =
      std::clamp(kBlockBytes / row_bytes, std::int64_t{kMaxTileRows}, kMaxBlockRows);
  Task task{};
  task.x = x;
  task.rows = rows;
  task.out = out;
  task.gemm = &engine_->kernels().gemm(format()).for_rows(
      static_cast<int>(std::min<std::int64_t>(rows, kMaxBlockRows)));
  task.blocks = (rows + most - 1) / most;
  const std::int64_t block_rows = (rows + task.blocks - 1) / task.blocks;
  task.block_tiles = (block_rows + kMaxTileRows - 1) / kMaxTileRows;
  task.code_stride = static_cast<std::int64_t>(scratch_stride(static_cast<std::size_t>(row_bytes)));
  const auto room = static_cast<std::size_t>(task.blocks * task.block_tiles * kMaxTileRows);
  RowMemory& memory = row_memory();
  const std::size_t bytes = room * static_cast<std::size_t>(task.code_stride);
  if (memory.codes.bytes() < bytes) memory.codes = AlignedBuffer(bytes);
  if (memory.scales.size() < room) memory.scales.resize(room);
  task.codes = memory.codes.as<std::uint8_t>();
  task.scales = memory.scales.data();
  return task;
}

// Where the rows' ranks go in T, and which of them are to be shrunk for which rows.
void PackedLinear::plan_loras(Task& task) {
  shrinks_.clear();
  if (chosen_.silent()) return;
  std::int64_t widest = 0;
  for (const Loras::Mix& mix : chosen_.mixes) {
    std::int64_t width = 0;
    for (const Loras::Part& part : mix) width += part.lora->input_shrink().width();
    widest = std::max(widest, width);
  }
  task.t_stride = widest + kShrunkPadding;
  std::vector<std::uint16_t>& t = row_memory().t;
  t.assign(static_cast<std::size_t>(task.blocks * task.block_tiles * kMaxTileRows * task.t_stride),
           0);
  task.t = t.data();
  if (chosen_.mixes.size() == 1 && chosen_.mixes[0].size() == 1) {
    task.fused = chosen_.mixes[0].data();
  }
  for (std::int64_t index = 0; index < task.blocks; ++index) {
    const Block block = task.block(index);
    groups_.clear();
    groups_.add(chosen_.of_row, static_cast<int>(chosen_.mixes.size()), block.row,
                block.row + block.rows, kMaxTileRows);
    for (std::size_t i = 0; i < groups_.size(); ++i) {
      plan_shrinks(groups_[i], block.scratch_row + groups_[i].first - block.row,
                   task.rows <= kRowsToSplitRanks);
    }
  }
}

void PackedLinear::plan_shrinks(const RowGroup& group, std::int64_t scratch_row, bool split_ranks) {
  std::int64_t offset = 0;
  for (const Loras::Part& part : chosen_.mixes[static_cast<std::size_t>(group.mix)]) {
    const ExpertLora::Shrink& lora = part.lora->input_shrink();
    const int step = split_ranks ? 1 : lora.blocks;
    for (int first = 0; first < lora.blocks; first += step) {
      shrinks_.push_back({group, scratch_row, &part, offset, first, step});
    }
    offset += lora.width();
  }
}

PackedLinear::Block PackedLinear::Task::block(std::int64_t index) const {
  const std::int64_t row = rows * index / blocks;
  const auto count = static_cast<int>(rows * (index + 1) / blocks - row);
  return {row, count, index * block_tiles * kMaxTileRows, gemm->tile_rows(count)};
}

// Quantises or copies a tile of rows, or shrinks a group of them.
void PackedLinear::prepare(const Task& task, std::int64_t unit) const {
  const std::int64_t tiles = task.blocks * task.block_tiles;
  if (unit >= tiles) return shrink(task, shrinks_[static_cast<std::size_t>(unit - tiles)]);
  const Block block = task.block(unit / task.block_tiles);
  const int step = task.gemm->tile_order ? block.tile_rows : kMaxTileRows;
  const int first = static_cast<int>(unit % task.block_tiles) * step;
  if (first >= block.rows) return;
  gather(task, {block.row + first, std::min(step, block.rows - first), block.scratch_row + first,
                block.tile_rows});
}

void PackedLinear::gather(const Task& task, const Block& tile) const {
  const ElementwiseKernels& kernels = *engine_->kernels().elementwise;
  const bool int8 = quantizes_rows(format());
  const int padded_k = base_->matrix.layout.padded_k();
  const int row_bytes = padded_k * (int8 ? 1 : 2);
  const std::int64_t in = in_features();
  std::uint8_t* const out = task.codes + tile.scratch_row * task.code_stride;
  std::uint8_t* rows = out;
  if (task.gemm->tile_order) {
    rows = thread_values<std::uint8_t>(static_cast<std::size_t>(kMaxTileRows * task.code_stride));
  }
  const std::uint8_t* gathered[kMaxTileRows];
  for (int r = 0; r < tile.rows; ++r) {
    const std::uint16_t* const x = task.x + (tile.row + r) * in;
    std::uint8_t* row = rows + r * task.code_stride;
    gathered[r] = row;
    if (int8) {
      task.scales[tile.scratch_row + r] = kernels.quantize_row(x, static_cast<int>(in), padded_k,
                                                               task.gemm->activation_offset, row);
    } else {
      const auto bytes = static_cast<std::size_t>(in) * sizeof(std::uint16_t);
      std::memcpy(row, x, bytes);
      std::memset(row + bytes, 0, static_cast<std::size_t>(row_bytes) - bytes);
    }
  }
  if (task.gemm->tile_order) {
    kernels.to_tile(gathered, tile.rows, tile.tile_rows, row_bytes, row_bytes, out);
  }
}

void PackedLinear::shrink(const Task& task, const Shrink& shrink) const {
  const ExpertLora::Shrink& lora = shrink.part->lora->input_shrink();
  const std::int64_t in = in_features();
  const std::int64_t first_rank = std::int64_t{shrink.first_block} * ExpertLora::kBlockRanks;
  ShrinkArgs args{};
  args.x = task.x + shrink.rows.first * in;
  args.x_stride = shrink.rows.step * in;
  args.rows = shrink.rows.rows;
  if (in != lora.k) {
    auto* padded = thread_values<std::uint16_t>(static_cast<std::size_t>(kMaxTileRows) *
                                                static_cast<std::size_t>(lora.k));
    for (int r = 0; r < args.rows; ++r) {
      std::uint16_t* row = padded + std::int64_t{r} * lora.k;
      std::copy_n(args.x + r * args.x_stride, in, row);
      std::fill(row + in, row + lora.k, std::uint16_t{0});
    }
    args.x = padded;
    args.x_stride = lora.k;
  }
  args.tile_rows = 1;
  args.a = lora.of(0) + first_rank * lora.k;
  args.blocks = shrink.blocks;
  args.k = lora.k;
  args.t = task.t + shrink.scratch_row * task.t_stride + shrink.t_offset + first_rank;
  args.t_stride = shrink.rows.step * task.t_stride;
  engine_->kernels().shrink_for(*task.gemm).run(args);
  if (shrink.part->weight == 1.0f) return;
  for (int r = 0; r < args.rows; ++r) {
    std::uint16_t* const row = args.t + r * args.t_stride;
    for (int i = 0; i < args.blocks * ExpertLora::kBlockRanks; ++i) {
      row[i] = f32_to_bf16(bf16_to_f32(row[i]) * shrink.part->weight);
    }
  }
}

const std::uint8_t* PackedLinear::first_tile(int strip) const {
  return base_->matrix.codes + base_->matrix.layout.tile_offset(strip, 0);
}

GemmArgs PackedLinear::gemm_args(const Task& task, const Block& block, int strip) const {
  const PackedMatrix& matrix = base_->matrix;
  GemmArgs args{};
  args.a = task.codes + block.scratch_row * task.code_stride;
  args.a_stride = block.tile_rows * task.code_stride;
  args.tile_rows = block.tile_rows;
  args.a_scale = task.scales + block.scratch_row;
  args.rows = block.rows;
  args.w_block = matrix.codes + matrix.layout.block_offset(strip);
  args.block_rows = matrix.layout.block_rows(strip);
  args.row_in_block = matrix.layout.row_in_block(strip);
  args.k = matrix.layout.padded_k();
  if (matrix.scales != nullptr) {
    args.w_scale = matrix.scales + std::int64_t{strip} * matrix.layout.strip_scales();
  }
  if (matrix.sums != nullptr) args.w_sum = matrix.sums + std::int64_t{strip} * kStripRows;
  if (task.fused == nullptr) return args;
  const ExpertLora::Expand& expand = task.fused->lora->expand(Projection::kUp);
  args.lora_b = expand.of(0, strip);
  args.t = task.t + block.scratch_row * task.t_stride;
  args.t_stride = task.t_stride;
  args.rank_pairs = expand.rank_pairs;
  return args;
}

// c [rows][32] of one strip += each row's LoRA, where the strip has not added it.
void PackedLinear::expand(const Task& task, const Block& block, int strip, float* c) const {
  if (task.t == nullptr || task.fused != nullptr) return;
  const auto mix_of = [&](int r) {
    return chosen_.of_row[static_cast<std::size_t>(block.row + r)];
  };
  for (int r = 0, end = 0; r < block.rows; r = end) {
    const int mix = mix_of(r);
    for (end = r + 1; end < block.rows && mix_of(end) == mix;) ++end;
    ExpandArgs args{};
    args.rows = end - r;
    args.t = task.t + (block.scratch_row + r) * task.t_stride;
    args.t_stride = task.t_stride;
    args.c = c + std::int64_t{r} * kStripRows;
    for (const Loras::Part& part : chosen_.mixes[static_cast<std::size_t>(mix)]) {
      const ExpertLora::Expand& expand = part.lora->expand(Projection::kUp);
      args.lora_b = expand.of(0, strip);
      args.rank_pairs = expand.rank_pairs;
      task.gemm->expand(args);
      args.t += part.lora->input_shrink().width();
    }
  }
}

// All rows of a range of strips.
void PackedLinear::multiply(const Task& task, const Piece& piece, int thread) const {
  if (task.rows <= task.gemm->side_rows) return multiply_few_rows(task, piece);
  float* const c = task.c + thread * kMaxBlockRows * kStripRows;
  for (std::int64_t index = 0; index < task.blocks; ++index) {
    const Block block = task.block(index);
    for (int strip = piece.first_strip; strip < piece.end_strip; ++strip) {
      GemmArgs args = gemm_args(task, block, strip);
      args.c = c;
      if (strip + 1 < piece.end_strip) {
        args.next = first_tile(strip + 1);
      } else if (index + 1 < task.blocks) {
        args.next = first_tile(piece.first_strip);
      }
      task.gemm->strip(args);
      expand(task, block, strip, c);
      store(task, block, strip, c);
    }
  }
}

// Several strips side by side.
void PackedLinear::multiply_few_rows(const Task& task, const Piece& piece) const {
  const Block rows = task.block(0);
  alignas(kCacheLine) float c[kMaxSideSums * kStripRows];
  GemmArgs args[kMaxSideStrips];
  const int step = side_strips(rows.rows);
  for (int first = piece.first_strip; first < piece.end_strip; first += step) {
    const int count = std::min(step, piece.end_strip - first);
    for (int i = 0; i < count; ++i) {
      args[i] = gemm_args(task, rows, first + i);
      args[i].c = c + i * rows.rows * kStripRows;
    }
    task.gemm->side_by_side(args, count);
    for (int i = 0; i < count; ++i) {
      expand(task, rows, first + i, args[i].c);
      store(task, rows, first + i, args[i].c);
    }
  }
}

// c [rows][32] of one strip, the bias added, as BF16.
void PackedLinear::store(const Task& task, const Block& block, int strip, float* c) const {
  const ElementwiseKernels& kernels = *engine_->kernels().elementwise;
  const std::int64_t out = out_features();
  const std::int64_t column = std::int64_t{strip} * kStripRows;
  if (!base_->bias.empty()) kernels.add_bias(base_->bias.as<float>() + column, block.rows, c);
  const auto columns = static_cast<int>(std::min<std::int64_t>(kStripRows, out - column));
  for (int r = 0; r < block.rows; ++r) {
    kernels.f32_to_bf16(c + r * kStripRows, columns, task.out + (block.row + r) * out + column);
  }
}

void PackedLinear::forward(const std::uint16_t* x, std::int64_t x_count, std::uint16_t* out,
                           std::int64_t out_count, const AdapterIds& adapters) {
  const std::int64_t in = in_features();
  const std::int64_t rows = check_rows(x, x_count, out, out_count, in, out_features());
  check_adapter_ids(adapters);
  if (rows == 0) return;
  const auto lease = engine_->lease();
  ThreadPool& pool = lease.pool();
  loras_.choose(adapters, rows, chosen_);
  Task task = make_task(x, rows, out);
  plan_loras(task);
  // 40 KB a thread: too much for a stack.
  task.c = reinterpret_cast<float*>(lease.scratch().block(static_cast<std::size_t>(
      pool.size() * kMaxBlockRows * kStripRows * std::int64_t{sizeof(float)})));
  const std::int64_t units =
      task.blocks * task.block_tiles + static_cast<std::int64_t>(shrinks_.size());
  // In floating point: a few sizes at their limits multiply to more than 2^63.
  const double work = static_cast<double>(out_features()) * static_cast<double>(in) *
                      static_cast<double>(kRowsPerRead + rows);
  const bool alone = work < kAloneBelow;
  const int strips = base_->matrix.layout.strips();
  schedule_columns({0, strips}, {.max_strips = strips}, alone ? 1 : pool.size(), queue_);
  std::atomic<std::int64_t> next{0};
  const auto prepare_rows = [&] {
    for (std::int64_t unit = next++; unit < units; unit = next++) prepare(task, unit);
  };
  const auto multiply_strips = [&](int thread) {
    while (const Piece* piece = queue_.claim()) multiply(task, *piece, thread);
  };
  if (alone) {
    prepare_rows();
    multiply_strips(0);
    return;
  }
  pool.run([&](int thread) {
    prepare_rows();
    pool.barrier();
    multiply_strips(thread);
  });
}

}  // namespace ktrt
