#include "moe/forward.h"

#include <algorithm>
#include <cstring>

#include "base/bf16.h"

namespace ktrt {

namespace {

// Row strides in the scratch memory of this layer.
struct Strides {
  std::int64_t x;          // elements
  std::int64_t x_codes;    // bytes
  std::int64_t act;        // elements
  std::int64_t act_codes;  // bytes
  std::int64_t t_input;    // elements
  std::int64_t t_down;     // elements
};

Strides strides_of(const ForwardTask& task) {
  const auto bytes = [](int values, int size) {
    return static_cast<std::int64_t>(
        scratch_stride(static_cast<std::size_t>(values) * static_cast<std::size_t>(size)));
  };
  const int x = round_up(task.weights.shape().hidden_size, kStripRows);
  const int act = round_up(task.weights.shape().intermediate_size, kStripRows);
  return {bytes(x, 2) / 2,
          bytes(task.weights.layout(Projection::kUp).padded_k(), 1),
          bytes(act, 2) / 2,
          bytes(task.weights.layout(Projection::kDown).padded_k(), 1),
          task.lora != nullptr ? task.lora->input_shrink().width() : 0,
          task.lora != nullptr ? task.lora->down_shrink().width() : 0};
}

// What both phases of one thread need.
class ThreadForward {
 public:
  ThreadForward(const ForwardTask& task, int thread)
      : task_(task),
        strides_(strides_of(task)),
        scratch_(task.workspace.thread(thread)),
        shared_(task.workspace.shared()),
        int8_(is_quantized(task.weights.format())),
        has_gate_(task.weights.shape().has_gate) {}

  void gate_up(const Piece& piece);
  void down(const Piece& piece) const;

 private:
  void gather(const Job& job) const;
  void quantize_and_shrink_activations(const Job& job) const;
  GemmArgs gemm_args(const Job& job, Projection projection, int strip, float* c) const;
  void project_input(const Job& job, Projection projection, int strip, float* c,
                     const std::uint8_t* next) const;
  void add_bias(const Job& job, Projection projection, int strip, float* c) const;
  void activate(const Job& job, int strip) const;
  void use_input(GemmArgs& args) const;
  void use_activations(GemmArgs& args, const Job& job) const;
  void store_group(int first_strip, int strips) const;

  const ForwardTask& task_;
  const Strides strides_;
  const Workspace::Thread& scratch_;
  const Workspace::Shared& shared_;
  const bool int8_;  // the activations'
  const bool has_gate_;
  int gathered_job_ = -1;  // whose rows are in scratch_
};

// Copies (and rounds) the job's rows, so that they lie together and padded; then what the GEMM and
// the LoRA shrink read.
void ThreadForward::gather(const Job& job) const {
  const TensorView& hidden = task_.hidden_states;
  const int count = task_.weights.shape().hidden_size;
  const int padded = round_up(count, kStripRows);
  const PackedLayout& layout = task_.weights.layout(Projection::kUp);
  for (int r = 0; r < job.rows; ++r) {
    const std::byte* source =
        hidden.row(task_.plan.rows()[static_cast<std::size_t>(job.first_row + r)].token);
    std::uint16_t* x = scratch_.x + r * strides_.x;
    if (hidden.dtype == DType::kFloat32) {
      task_.kernels.elementwise->f32_to_bf16(reinterpret_cast<const float*>(source), count, x);
    } else {
      row_to_bf16(source, hidden.dtype, count, x);
    }
    std::fill(x + count, x + padded, std::uint16_t{0});
    if (int8_) {
      scratch_.scales[r] = task_.kernels.elementwise->quantize_row(
          x, count, layout.padded_k(), task_.gemm.for_rows(job.rows).activation_offset,
          scratch_.codes + r * strides_.x_codes);
    }
  }
  if (task_.lora == nullptr || task_.lora->input_shrink().blocks == 0) return;
  const ExpertLora::Shrink& shrink = task_.lora->input_shrink();
  task_.kernels.lora_shrink->run({scratch_.x, strides_.x, job.rows, shrink.of(job.expert),
                                  shrink.blocks, shrink.k, scratch_.t, strides_.t_input});
}

void ThreadForward::quantize_and_shrink_activations(const Job& job) const {
  const int count = task_.weights.shape().intermediate_size;
  const PackedLayout& layout = task_.weights.layout(Projection::kDown);
  if (int8_) {
    for (int r = job.first_row; r < job.first_row + job.rows; ++r) {
      shared_.scales[r] = task_.kernels.elementwise->quantize_row(
          shared_.act + r * strides_.act, count, layout.padded_k(),
          task_.gemm.for_rows(job.rows).activation_offset, shared_.codes + r * strides_.act_codes);
    }
  }
  if (task_.lora == nullptr || task_.lora->down_shrink().blocks == 0) return;
  const ExpertLora::Shrink& shrink = task_.lora->down_shrink();
  task_.kernels.lora_shrink->run({shared_.act + job.first_row * strides_.act, strides_.act,
                                  job.rows, shrink.of(job.expert), shrink.blocks, shrink.k,
                                  shared_.t + job.first_row * strides_.t_down, strides_.t_down});
}

// Everything but the activations: weights of one strip and its LoRA expand.
GemmArgs ThreadForward::gemm_args(const Job& job, Projection projection, int strip,
                                  float* c) const {
  const StripRef w = task_.weights.strip(job.expert, projection, strip);
  GemmArgs args{};
  args.rows = job.rows;
  args.w_block = w.block;
  args.block_rows = w.block_rows;
  args.row_in_block = w.row_in_block;
  args.k = task_.weights.layout(projection).padded_k();
  args.w_scale = w.scales;
  args.w_sum = w.sums;
  if (task_.lora != nullptr) {
    const ExpertLora::Expand& expand = task_.lora->expand(projection);
    if (expand.rank_pairs > 0) {
      args.lora_b = expand.of(job.expert, strip);
      args.rank_pairs = expand.rank_pairs;
    }
  }
  args.c = c;
  return args;
}

void ThreadForward::use_input(GemmArgs& args) const {
  args.a = int8_ ? scratch_.codes : reinterpret_cast<const std::uint8_t*>(scratch_.x);
  args.a_stride = int8_ ? strides_.x_codes : strides_.x * 2;
  args.a_scale = scratch_.scales;
  args.t_stride = strides_.t_input;
}

void ThreadForward::use_activations(GemmArgs& args, const Job& job) const {
  args.a = int8_
               ? shared_.codes + job.first_row * strides_.act_codes
               : reinterpret_cast<const std::uint8_t*>(shared_.act + job.first_row * strides_.act);
  args.a_stride = int8_ ? strides_.act_codes : strides_.act * 2;
  args.a_scale = shared_.scales + job.first_row;
  args.t = shared_.t + job.first_row * strides_.t_down;
  args.t_stride = strides_.t_down;
}

// C of one strip of gate or up, bias included. `next`: what is read afterwards.
void ThreadForward::project_input(const Job& job, Projection projection, int strip, float* c,
                                  const std::uint8_t* next) const {
  GemmArgs args = gemm_args(job, projection, strip, c);
  use_input(args);
  if (task_.lora != nullptr) args.t = scratch_.t + task_.lora->expand(projection).t_offset;
  args.next = next;
  task_.gemm.for_rows(job.rows).strip(args);
  add_bias(job, projection, strip, c);
}

void ThreadForward::add_bias(const Job& job, Projection projection, int strip, float* c) const {
  if (task_.biases == nullptr) return;
  const float* bias = task_.biases->of(job.expert, projection, strip);
  if (bias != nullptr) task_.kernels.elementwise->add_bias(bias, job.rows, c);
}

// Makes the intermediate activations of one strip of what project_input left in C.
void ThreadForward::activate(const Job& job, int strip) const {
  const ElementwiseKernels& kernels = *task_.kernels.elementwise;
  std::uint16_t* out = shared_.act + job.first_row * strides_.act + strip * kStripRows;
  const float* gate = has_gate_ ? scratch_.c : nullptr;
  if (has_gate_ && task_.activation.is_silu_mul()) {
    kernels.silu_mul(gate, scratch_.c_up, job.rows, out, strides_.act);
  } else {
    kernels.activate(task_.activation, gate, scratch_.c_up, job.rows, out, strides_.act);
  }
}

void ThreadForward::gate_up(const Piece& piece) {
  const Job& job = task_.plan.jobs()[static_cast<std::size_t>(piece.job)];
  if (gathered_job_ != piece.job) gather(job);
  gathered_job_ = piece.job;
  const auto first_tile = [&](Projection projection, int strip) {
    return task_.weights.strip(job.expert, projection, strip).first_tile;
  };
  const Projection first = has_gate_ ? Projection::kGate : Projection::kUp;
  for (int strip = piece.first_strip; strip < piece.end_strip; ++strip) {
    if (has_gate_) {
      project_input(job, Projection::kGate, strip, scratch_.c, first_tile(Projection::kUp, strip));
    }
    const bool last = strip + 1 == piece.end_strip;
    project_input(job, Projection::kUp, strip, scratch_.c_up,
                  last ? nullptr : first_tile(first, strip + 1));
    activate(job, strip);
  }
  const int done = piece.end_strip - piece.first_strip;
  const int before = task_.finished_strips[piece.job].fetch_add(done, std::memory_order_acq_rel);
  if (before + done == task_.weights.layout(Projection::kUp).strips()) {
    quantize_and_shrink_activations(job);
  }
}

// Sums of all jobs for the piece's output columns, then their conversion.
void ThreadForward::down(const Piece& piece) const {
  const int first_strip = piece.first_strip;
  const int strips = piece.end_strip - piece.first_strip;
  const std::int64_t columns = static_cast<std::int64_t>(strips) * kStripRows;
  const std::int64_t qlen = task_.out.shape[0];
  std::memset(scratch_.out, 0, static_cast<std::size_t>(qlen * columns) * sizeof(float));
  const std::vector<Job>& jobs = task_.plan.jobs();
  for (std::size_t j = 0; j < jobs.size(); ++j) {
    const Job& job = jobs[j];
    const GemmKernel& gemm = task_.gemm.for_rows(job.rows);
    for (int s = 0; s < strips; ++s) {
      GemmArgs args = gemm_args(job, Projection::kDown, first_strip + s, scratch_.c);
      use_activations(args, job);
      const bool last = s + 1 == strips;
      if (!last || j + 1 < jobs.size()) {
        const int next_expert = last ? jobs[j + 1].expert : job.expert;
        const int next_strip = last ? first_strip : first_strip + s + 1;
        args.next = task_.weights.strip(next_expert, Projection::kDown, next_strip).first_tile;
      }
      gemm.strip(args);
      add_bias(job, Projection::kDown, first_strip + s, scratch_.c);
      for (int r = 0; r < job.rows; ++r) {
        const PlanRow& row = task_.plan.rows()[static_cast<std::size_t>(job.first_row + r)];
        task_.kernels.elementwise->weighted_add(
            scratch_.c + r * kStripRows, row.weight,
            scratch_.out + row.token * columns + s * kStripRows);
      }
    }
  }
  store_group(first_strip, strips);
}

void ThreadForward::store_group(int first_strip, int strips) const {
  const int columns = strips * kStripRows;
  const int first_column = first_strip * kStripRows;
  const int valid = std::min(columns, task_.weights.shape().hidden_size - first_column);
  const TensorView& out = task_.out;
  for (std::int64_t token = 0; token < out.shape[0]; ++token) {
    const float* sums = scratch_.out + token * columns;
    std::byte* row =
        out.mutable_row(token) + static_cast<std::size_t>(first_column) * size_of(out.dtype);
    switch (out.dtype) {
      case DType::kFloat32:
        std::memcpy(row, sums, static_cast<std::size_t>(valid) * sizeof(float));
        break;
      case DType::kBfloat16:
        task_.kernels.elementwise->f32_to_bf16(sums, valid, reinterpret_cast<std::uint16_t*>(row));
        break;
      default:
        for (int c = 0; c < valid; ++c) reinterpret_cast<fp16_t*>(row)[c] = f32_to_fp16(sums[c]);
    }
  }
}

// Strips of output columns whose sums fit one thread's scratch memory.
int max_output_strips(std::int64_t qlen) {
  const std::size_t strip_bytes = static_cast<std::size_t>(qlen) * kStripRows * sizeof(float);
  return static_cast<int>(std::max<std::size_t>(1, kOutputBlockBytes / strip_bytes));
}

}  // namespace

void run_forward(const ForwardTask& task, ThreadPool& pool) {
  const std::int64_t qlen = task.out.shape[0];
  if (qlen == 0) return;
  const int parts = task.weights.parts();
  const int threads_per_part = std::max(1, pool.size() / parts);
  for (int p = 0; p < parts; ++p) {
    const auto strips = [&](Projection projection) {
      return StripRange{task.weights.first_strip(projection, p),
                        task.weights.first_strip(projection, p + 1)};
    };
    PartQueues& queues = task.queues[static_cast<std::size_t>(p)];
    schedule_jobs(task.plan.jobs(), strips(Projection::kUp), threads_per_part, queues.gate_up);
    schedule_columns(strips(Projection::kDown), max_output_strips(qlen), threads_per_part,
                     queues.down);
  }
  pool.run([&](int thread) {
    ThreadForward forward(task, thread);
    const int home = task.home[static_cast<std::size_t>(thread)];
    for (int p = 0; p < parts; ++p) {
      PartQueues& queues = task.queues[static_cast<std::size_t>((home + p) % parts)];
      while (const Piece* piece = queues.gate_up.claim()) forward.gate_up(*piece);
    }
    pool.barrier();
    for (int p = 0; p < parts; ++p) {
      PartQueues& queues = task.queues[static_cast<std::size_t>((home + p) % parts)];
      while (const Piece* piece = queues.down.claim()) forward.down(*piece);
    }
  });
}

}  // namespace ktrt
