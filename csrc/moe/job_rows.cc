#include "moe/job_rows.h"

#include <algorithm>
#include <span>

#include "base/bf16.h"

namespace ktrt {

namespace {

RowStrides strides_of(const ForwardTask& task) {
  const auto bytes = [](int values, int size) {
    return static_cast<std::int64_t>(
        scratch_stride(static_cast<std::size_t>(values) * static_cast<std::size_t>(size)));
  };
  const int x = round_up(task.weights.shape().hidden_size, kStripRows);
  const int act = round_up(task.weights.shape().intermediate_size, kStripRows);
  return {bytes(x, 2) / 2,
          bytes(task.weights.layout(Projection::kUp).padded_k(), 1),
          bytes(act, 2) / 2,
          bytes(task.weights.layout(Projection::kDown).padded_k() * task.weights.down_slices(), 1),
          task.lora != nullptr ? task.lora->input_shrink().width() + kShrunkPadding : 0,
          task.lora != nullptr ? task.lora->down_shrink().width() + kShrunkPadding : 0};
}

// Rounds once more, where the factor is neither 1 nor 0.
void scale_row(std::span<const float> factors, std::uint16_t* t) {
  for (std::size_t i = 0; i < factors.size(); ++i) {
    // Not a product with 0, which would keep NaN.
    t[i] = factors[i] == 0.0f ? bf16_t{0} : f32_to_bf16(factors[i] * bf16_to_f32(t[i]));
  }
}

}  // namespace

JobRows::JobRows(const ForwardTask& task, int thread)
    : task_(task),
      strides_(strides_of(task)),
      scratch_(task.workspace.thread(thread)),
      shared_(task.workspace.shared()),
      elementwise_(*task.kernels.elementwise),
      int8_(is_quantized(task.weights.format())) {}

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
  if (task_.lora == nullptr) return;
  ShrinkArgs args = input_shrink_args(job);
  args.t = scratch_.t;
  shrink(job, task_.lora->input_shrink(), args, &LoraFactors::input);
}

void JobRows::shrink_input_block(const Job& job, int block, int first_row) const {
  const ExpertLora::Shrink& shrink = task_.lora->input_shrink();
  ShrinkArgs args = input_shrink_args(job);
  args.t = shared_.t_input + first_row * strides_.t_input;
  if (block + 1 == shrink.blocks) pad_shrunk(job, shrink, args);
  const std::int64_t ranks = static_cast<std::int64_t>(block) * ExpertLora::kBlockRanks;
  args.rows = job.rows;
  args.a = shrink.of(job.expert) + ranks * shrink.k;
  args.blocks = 1;
  args.k = shrink.k;
  args.t += ranks;
  task_.kernels.shrink_for(gemm_for(job)).run(args);
  weigh(job, args, &LoraFactors::input, block * ExpertLora::kBlockRanks);
}

void JobRows::gather_rows(const Job& job) const {
  const TensorView& hidden = task_.hidden_states;
  const int count = task_.weights.shape().hidden_size;
  const int padded = round_up(count, kStripRows);
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
  const bool shrinks = task_.lora != nullptr && task_.lora->input_shrink().blocks > 0;
  for (int first = 0; first < job.rows; first += rows_in_tile) {
    const int rows = std::min(rows_in_tile, job.rows - first);
    const PlanRow* plan = task_.plan.rows().data() + job.first_row + first;
    const std::uint8_t* x[kMaxTileRows];
    const std::uint8_t* codes[kMaxTileRows];
    for (int r = 0; r < rows; ++r) {
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
      elementwise_.to_tile(x, rows, rows_in_tile, count * 2, round_up(count, kStripRows) * 2,
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
  for (int first = 0; first < job.rows; first += rows_in_tile) {
    const int rows = std::min(rows_in_tile, job.rows - first);
    const int row = job.scratch_row + first;
    std::uint8_t* out = shared_.codes + row * strides_.act_codes;
    std::uint8_t* quantized = gemm.tile_order ? scratch_.tile_codes : out;
    for (int r = 0; r < rows; ++r) {
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

void JobRows::quantize_and_shrink_activations(const Job& job) const {
  if (int8_) quantize_activations(job);
  if (task_.lora == nullptr) return;
  ShrinkArgs args{};
  args.x = shared_.act + job.scratch_row * strides_.act;
  args.x_stride = act_tile_rows(job) * strides_.act;
  args.tile_rows = act_tile_rows(job);
  args.t = shared_.t + job.scratch_row * strides_.t_down;
  args.t_stride = strides_.t_down;
  shrink(job, task_.lora->down_shrink(), args, &LoraFactors::down);
}

// `args` says where X and T are.
void JobRows::shrink(const Job& job, const ExpertLora::Shrink& shrink, ShrinkArgs args,
                     std::vector<float> LoraFactors::*factors) const {
  if (shrink.blocks == 0) return;
  args.rows = job.rows;
  args.a = shrink.of(job.expert);
  args.blocks = shrink.blocks;
  args.k = shrink.k;
  task_.kernels.shrink_for(gemm_for(job)).run(args);
  weigh(job, args, factors, 0);
  pad_shrunk(job, shrink, args);
}

// Multiplies shrunk ranks, from `first_rank` on, by the factors of the rows' tokens.
void JobRows::weigh(const Job& job, const ShrinkArgs& args,
                    std::vector<float> LoraFactors::*factors, int first_rank) const {
  if (task_.factors == nullptr) return;
  const PlanRow* rows = task_.plan.rows().data() + job.first_row;
  const auto ranks = static_cast<std::size_t>(args.blocks * ExpertLora::kBlockRanks);
  for (int r = 0; r < job.rows; ++r) {
    const int chosen = task_.chosen_factors ? task_.chosen_factors[rows[r].token] : 0;
    const std::span<const float> all(task_.factors[chosen].*factors);
    scale_row(all.subspan(static_cast<std::size_t>(first_rank), ranks), args.t + r * args.t_stride);
  }
}

// Zeros after the ranks, which kernels in tile order read.
void JobRows::pad_shrunk(const Job& job, const ExpertLora::Shrink& shrink,
                         const ShrinkArgs& args) const {
  if (!gemm_for(job).tile_order) return;
  for (int r = 0; r < job.rows; ++r) {
    std::uint16_t* after = args.t + r * args.t_stride + shrink.width();
    std::fill(after, after + kShrunkPadding, std::uint16_t{0});
  }
}

void JobRows::use_input(GemmArgs& args, Projection projection, int first_row) const {
  args.a = int8_ ? scratch_.codes : reinterpret_cast<const std::uint8_t*>(scratch_.x);
  args.a_stride = args.tile_rows * (int8_ ? strides_.x_codes : strides_.x * 2);
  args.a_scale = scratch_.scales;
  if (task_.lora == nullptr) return;
  args.t = first_row < 0 ? scratch_.t : shared_.t_input + first_row * strides_.t_input;
  args.t += task_.lora->expand(projection).t_offset;
  args.t_stride = strides_.t_input;
}

void JobRows::use_activations(GemmArgs& args, const Job& job, int slice) const {
  const std::int64_t row = job.scratch_row;
  args.a = int8_ ? shared_.codes + row * strides_.act_codes + slice * args.k * args.tile_rows
                 : reinterpret_cast<const std::uint8_t*>(shared_.act + row * strides_.act);
  args.a_stride = args.tile_rows * (int8_ ? strides_.act_codes : strides_.act * 2);
  args.a_scale = activation_scales(job.scratch_row, slice);
  args.t = shared_.t + row * strides_.t_down;
  args.t_stride = strides_.t_down;
}

}  // namespace ktrt
