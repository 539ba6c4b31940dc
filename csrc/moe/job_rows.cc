#include "moe/job_rows.h"

#include <algorithm>

#include "base/bf16.h"

namespace ktrt {

namespace {

// Columns of a BF16 row of `values` with its padding, which the LoRA shrink reads, and the GEMM
// where it takes BF16.
int bf16_columns(const ExpertWeights& weights, Projection projection, int values) {
  return quantizes_rows(weights.format()) ? round_up(values, kStripRows)
                                          : weights.layout(projection).padded_k();
}

RowStrides strides_of(const ForwardTask& task) {
  const auto bytes = [](int values, int size) {
    return static_cast<std::int64_t>(
        scratch_stride(static_cast<std::size_t>(values) * static_cast<std::size_t>(size)));
  };
  const int x = bf16_columns(task.weights, Projection::kUp, task.weights.shape().hidden_size);
  const int act =
      bf16_columns(task.weights, Projection::kDown, task.weights.shape().intermediate_size);
  return {bytes(x, 2) / 2,
          bytes(task.weights.layout(Projection::kUp).padded_k(), 1),
          bytes(act, 2) / 2,
          bytes(task.weights.layout(Projection::kDown).padded_k() * task.weights.down_slices(), 1),
          task.mixes.input_width() + kShrunkPadding,
          task.mixes.down_width() + kShrunkPadding};
}

// Asks for a row of `bytes` that is read soon.
void prefetch_row(const std::byte* row, int bytes) {
  for (int i = 0; i < bytes; i += static_cast<int>(kCacheLine)) __builtin_prefetch(row + i, 0, 2);
}

// The same for `bytes` that are written.
void prefetch_written(const std::uint8_t* bytes, int count) {
  for (int i = 0; i < count; i += static_cast<int>(kCacheLine)) __builtin_prefetch(bytes + i, 1, 3);
}

// Rounds once more.
void weigh(const ShrinkArgs& args, float weight) {
  const int ranks = args.blocks * ExpertLora::kBlockRanks;
  for (int r = 0; r < args.rows; ++r) {
    std::uint16_t* t = args.t + r * args.t_stride;
    for (int i = 0; i < ranks; ++i) t[i] = f32_to_bf16(weight * bf16_to_f32(t[i]));
  }
}

}  // namespace

JobRows::JobRows(const ForwardTask& task, int thread)
    : task_(task),
      strides_(strides_of(task)),
      scratch_(task.workspace.thread(thread)),
      shared_(task.workspace.shared()),
      elementwise_(*task.kernels.elementwise),
      int8_(quantizes_rows(task.weights.format())) {}

// A token's hidden state as BF16: itself, or rounded into `converted`.
const std::uint16_t* JobRows::bf16_row(int token, std::uint16_t* converted) const {
  const TensorView& hidden = task_.hidden_states;
  const int count = task_.weights.shape().hidden_size;
  const std::byte* source = hidden.row(token);
  if (hidden.dtype == DType::kBfloat16) return reinterpret_cast<const std::uint16_t*>(source);
  if (hidden.dtype == DType::kFloat32) {
    elementwise_.f32_to_bf16(reinterpret_cast<const float*>(source), count, converted);
  } else {
    row_to_bf16(source, hidden.dtype, count, converted);
  }
  return converted;
}

// Copies (and rounds) the job's rows, so that they lie together and padded, as the GEMM and the
// LoRA shrink read.
void JobRows::gather(const Job& job) const {
  if (gemm_for(job).tile_order) {
    gather_tiles(job);
  } else {
    gather_rows(job);
  }
}

ShrinkArgs JobRows::input_shrink_args(const Job& job) const {
  ShrinkArgs args{};
  args.x = scratch_.x;
  args.x_stride = tile_rows(job) * strides_.x;
  args.tile_rows = tile_rows(job);
  args.t_stride = strides_.t_input;
  return args;
}

void JobRows::shrink_input(const Job& job) const {
  if (task_.mixes.input_width() == 0) return;
  for (const MixRun& run : task_.plan.runs(job)) {
    const RowMixes::Mix& mix = task_.mixes.mix(run.mix);
    ShrinkArgs args = input_shrink_args(job);
    args.t = scratch_.t;
    pad_shrunk(job, run, mix.input_width, args);
    for (const RowMixes::Part& part : mix.parts) {
      const ExpertLora::Shrink& shrink = part.lora->input_shrink();
      args.t = scratch_.t + part.input_first;
      args.a = shrink.of(job.expert);
      args.blocks = shrink.blocks;
      args.k = shrink.k;
      shrink_run(job, run, args, part.weight);
    }
  }
}

void JobRows::shrink_input_block(const Job& job, const ShrinkBlock& block, int first_row) const {
  const MixRun& run = task_.plan.runs(job)[static_cast<std::size_t>(block.run)];
  const RowMixes::Mix& mix = task_.mixes.mix(run.mix);
  const RowMixes::Part& part = mix.parts[static_cast<std::size_t>(block.part)];
  const ExpertLora::Shrink& shrink = part.lora->input_shrink();
  const int ranks = block.block * ExpertLora::kBlockRanks;
  ShrinkArgs args = input_shrink_args(job);
  args.t = shared_.t_input + first_row * strides_.t_input;
  // Whoever shrinks the row's last ranks.
  if (part.input_first + ranks + ExpertLora::kBlockRanks == mix.input_width) {
    pad_shrunk(job, run, mix.input_width, args);
  }
  args.t += part.input_first + ranks;
  args.a = shrink.of(job.expert) + static_cast<std::int64_t>(ranks) * shrink.k;
  args.blocks = 1;
  args.k = shrink.k;
  shrink_run(job, run, args, part.weight);
}

void JobRows::gather_rows(const Job& job) const {
  const TensorView& hidden = task_.hidden_states;
  const int count = task_.weights.shape().hidden_size;
  const int padded = bf16_columns(task_.weights, Projection::kUp, count);
  const PackedLayout& layout = task_.weights.layout(Projection::kUp);
  for (int r = 0; r < job.rows; ++r) {
    const std::byte* source =
        hidden.row(task_.plan.rows()[static_cast<std::size_t>(job.first_row + r)].token);
    std::uint16_t* x = scratch_.x + r * strides_.x;
    if (hidden.dtype == DType::kFloat32) {
      elementwise_.f32_to_bf16(reinterpret_cast<const float*>(source), count, x);
    } else {
      row_to_bf16(source, hidden.dtype, count, x);
    }
    std::fill(x + count, x + padded, std::uint16_t{0});
    if (int8_) {
      scratch_.scales[r] =
          elementwise_.quantize_row(x, count, layout.padded_k(), gemm_for(job).activation_offset,
                                    scratch_.codes + r * strides_.x_codes);
    }
  }
}

void JobRows::gather_tiles(const Job& job) const {
  const int count = task_.weights.shape().hidden_size;
  const int padded = task_.weights.layout(Projection::kUp).padded_k();
  const int rows_in_tile = tile_rows(job);
  const bool shrinks = task_.mixes.input_width() > 0;
  // Tokens lie anywhere, and the hardware's prefetcher starts again with every row. BF16 rows are
  // read side by side.
  constexpr int kRowsAhead = 2;
  const auto ask = [&](int row) {
    if (!int8_ || row >= job.rows) return;
    const int token = task_.plan.rows()[static_cast<std::size_t>(job.first_row + row)].token;
    const TensorView& hidden = task_.hidden_states;
    prefetch_row(hidden.row(token), count * static_cast<int>(size_of(hidden.dtype)));
  };
  for (int first = 0; first < job.rows; first += rows_in_tile) {
    const int rows = std::min(rows_in_tile, job.rows - first);
    const PlanRow* plan = task_.plan.rows().data() + job.first_row + first;
    const std::uint8_t* x[kMaxTileRows];
    const std::uint8_t* codes[kMaxTileRows];
    for (int r = 0; r < rows; ++r) {
      ask(first + r + kRowsAhead);
      const std::uint16_t* row = bf16_row(plan[r].token, scratch_.tile_x + r * strides_.x);
      x[r] = reinterpret_cast<const std::uint8_t*>(row);
      if (int8_) {
        std::uint8_t* quantized = scratch_.tile_codes + r * strides_.x_codes;
        scratch_.scales[first + r] = elementwise_.quantize_row(row, count, padded, 0, quantized);
        codes[r] = quantized;
      }
    }
    if (int8_) {
      elementwise_.to_tile(codes, rows, rows_in_tile, padded, padded,
                           scratch_.codes + first * strides_.x_codes);
    }
    if (!int8_ || shrinks) {
      elementwise_.to_tile(x, rows, rows_in_tile, count * 2,
                           bf16_columns(task_.weights, Projection::kUp, count) * 2,
                           reinterpret_cast<std::uint8_t*>(scratch_.x + first * strides_.x));
    }
  }
}

// Scale of row `row` of scratch memory.
float* JobRows::activation_scales(int row, int slice) const {
  const int rows = max_scratch_rows(static_cast<int>(task_.plan.rows().size()));
  return shared_.scales + static_cast<std::int64_t>(slice) * rows + row;
}

// Where weights are quantised: the codes of the job's activations, in the order that its kernel
// reads.
void JobRows::quantize_activations(const Job& job) const {
  const PackedLayout& layout = task_.weights.layout(Projection::kDown);
  const int slices = task_.weights.down_slices();
  const int padded = slices * layout.padded_k();
  const GemmKernel& gemm = gemm_for(job);
  const int rows_in_tile = tile_rows(job);
  const std::uint8_t* codes[kMaxTileRows];
  // Strips made the activations long ago, and no cache has the codes' memory: what the row after
  // the next one reads, and this row's share of what the next tile writes.
  const auto ask = [&](int row, int in_tile, const std::uint8_t* next_tile) {
    const std::uint16_t* coming = shared_.act + (job.scratch_row + row + 2) * strides_.act;
    if (row + 2 < job.rows) prefetch_row(reinterpret_cast<const std::byte*>(coming), padded * 2);
    if (row - in_tile + rows_in_tile >= job.rows) return;
    prefetch_written(next_tile + static_cast<std::int64_t>(in_tile) * padded, padded);
  };
  for (int first = 0; first < job.rows; first += rows_in_tile) {
    const int rows = std::min(rows_in_tile, job.rows - first);
    const int row = job.scratch_row + first;
    std::uint8_t* out = shared_.codes + row * strides_.act_codes;
    std::uint8_t* quantized = gemm.tile_order ? scratch_.tile_codes : out;
    for (int r = 0; r < rows; ++r) {
      if (gemm.tile_order) ask(first + r, r, out + rows_in_tile * strides_.act_codes);
      std::uint8_t* row_codes = quantized + r * strides_.act_codes;
      codes[r] = row_codes;
      for (int slice = 0; slice < slices; ++slice) {
        *activation_scales(row + r, slice) = elementwise_.quantize_row(
            shared_.act + (row + r) * strides_.act + slice * layout.k(), layout.k(),
            layout.padded_k(), gemm.activation_offset, row_codes + slice * layout.padded_k());
      }
    }
    if (gemm.tile_order) elementwise_.to_tile(codes, rows, rows_in_tile, padded, padded, out);
  }
}

// Zeros in the padding that no strip of gate and up has written.
void JobRows::pad_activations(const Job& job) const {
  const int count = round_up(task_.weights.shape().intermediate_size, kStripRows);
  const int padded = bf16_columns(task_.weights, Projection::kDown, count);
  const int tile_rows = act_tile_rows(job);
  for (int first = 0; count < padded && first < job.rows; first += tile_rows) {
    std::uint16_t* const row = shared_.act + (job.scratch_row + first) * strides_.act;
    std::fill(row + count * tile_rows, row + padded * tile_rows, std::uint16_t{0});
  }
}

void JobRows::finish_activations(const Job& job) const {
  if (int8_) {
    quantize_activations(job);
  } else {
    pad_activations(job);
  }
  if (task_.mixes.down_width() == 0) return;
  std::uint16_t* const t = shared_.t + job.scratch_row * strides_.t_down;
  for (const MixRun& run : task_.plan.runs(job)) {
    const RowMixes::Mix& mix = task_.mixes.mix(run.mix);
    ShrinkArgs args{};
    args.x = shared_.act + job.scratch_row * strides_.act;
    args.x_stride = act_tile_rows(job) * strides_.act;
    args.tile_rows = act_tile_rows(job);
    args.t = t;
    args.t_stride = strides_.t_down;
    pad_shrunk(job, run, mix.down_width, args);
    for (const RowMixes::Part& part : mix.parts) {
      const ExpertLora::Shrink& shrink = part.lora->down_shrink();
      args.t = t + part.down_first;
      args.a = shrink.of(job.expert);
      args.blocks = shrink.blocks;
      args.k = shrink.k;
      shrink_run(job, run, args, part.weight);
    }
  }
}

// `args` is that of the job's rows.
void JobRows::shrink_run(const Job& job, const MixRun& run, ShrinkArgs args, float weight) const {
  if (args.blocks == 0) return;
  const ShrinkKernel& kernel = task_.kernels.shrink_for(gemm_for(job));
  const int tile_rows = args.tile_rows;
  const std::uint16_t* const x = args.x;
  args.t += run.first * args.t_stride;
  args.rows = run.rows;
  if (tile_rows == 1 || run.rows == job.rows) {
    args.x = x + run.first * args.x_stride;  // run.first is 0 in tile order
    kernel.run(args);
    if (weight != 1.0f) weigh(args, weight);
    return;
  }
  // The run's share of one tile after the other.
  args.x_step = std::int64_t{kStripRows} * tile_rows;
  for (int row = run.first; row < run.first + run.rows; row += args.rows) {
    const int in_tile = row % tile_rows;
    args.rows = std::min(tile_rows - in_tile, run.first + run.rows - row);
    args.tile_rows = args.rows;
    args.x = x + row / tile_rows * args.x_stride + in_tile * kStripRows;
    kernel.run(args);
    if (weight != 1.0f) weigh(args, weight);
    args.t += args.rows * args.t_stride;
  }
}

// Zeros after the ranks, which kernels in tile order read.
void JobRows::pad_shrunk(const Job& job, const MixRun& run, int width,
                         const ShrinkArgs& args) const {
  if (!gemm_for(job).tile_order) return;
  for (int r = run.first; r < run.first + run.rows; ++r) {
    std::uint16_t* after = args.t + r * args.t_stride + width;
    std::fill(after, after + kShrunkPadding, std::uint16_t{0});
  }
}

void JobRows::use_input(GemmArgs& args) const {
  args.a = int8_ ? scratch_.codes : reinterpret_cast<const std::uint8_t*>(scratch_.x);
  args.a_stride = args.tile_rows * (int8_ ? strides_.x_codes : strides_.x * 2);
  args.a_scale = scratch_.scales;
}

void JobRows::use_activations(GemmArgs& args, const Job& job, int slice) const {
  const std::int64_t row = job.scratch_row;
  args.a = int8_ ? shared_.codes + row * strides_.act_codes + slice * args.k * args.tile_rows
                 : reinterpret_cast<const std::uint8_t*>(shared_.act + row * strides_.act);
  args.a_stride = args.tile_rows * (int8_ ? strides_.act_codes : strides_.act * 2);
  args.a_scale = activation_scales(job.scratch_row, slice);
}

const std::uint16_t* JobRows::shrunk_input(int first_row) const {
  return first_row < 0 ? scratch_.t : shared_.t_input + first_row * strides_.t_input;
}

const std::uint16_t* JobRows::shrunk_activations(const Job& job) const {
  return shared_.t + job.scratch_row * strides_.t_down;
}

}  // namespace ktrt
