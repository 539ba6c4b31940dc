#include "moe/forward.h"

#include <algorithm>
#include <cstring>
#include <thread>

#include "base/bf16.h"
#include "moe/expands.h"
#include "moe/job_rows.h"

namespace ktrt {

namespace {

// Both phases of one thread.
class ThreadForward {
 public:
  ThreadForward(const ForwardTask& task, int thread)
      : task_(task),
        rows_(task, thread),
        expands_(task, rows_),
        scratch_(task.workspace.thread(thread)),
        shared_(task.workspace.shared()),
        has_gate_(task.weights.shape().has_gate) {}

  void shrink_input(const Piece& piece);
  void gate_up(const Piece& piece);
  void down(const Piece& piece) const;

 private:
  GemmArgs gemm_args(const Job& job, Projection projection, int strip, float* c,
                     int slice = 0) const;
  void gather(int job);
  void await_shrink(int job) const;
  GemmArgs input_args(int job, Projection projection, int strip, float* c) const;
  void project_input(int job, Projection projection, int strip, float* c,
                     const std::uint8_t* next) const;
  void finish_input(int job, Projection projection, int strip, float* c) const;
  void gate_up_strips(const Piece& piece) const;
  void gate_up_few_rows(const Piece& piece) const;
  void add_down_strip(const Piece& piece, std::size_t j, int strip, int slice) const;
  void add_down(const Piece& piece) const;
  void add_bias(const Job& job, Projection projection, int strip, float* c) const;
  void activate(const Job& job, int strip, const float* gate, const float* up) const;
  const std::uint8_t* tile_after(std::size_t job, int strip, int slice, const Piece& piece) const;
  GemmArgs down_args(const Job& job, int strip, int slice, float* c) const;
  void finish_down(const Piece& piece, const Job& job, int strip, int slice, float* c) const;
  void add_weighted(const Job& job, const float* c, float* out, int first_token,
                    std::int64_t columns) const;
  void store_group(const Piece& piece) const;

  int first_token(const Piece& piece) const { return piece.job * task_.plan.block_tokens(); }
  int tokens(const Piece& piece) const {
    const int rest = static_cast<int>(task_.out.shape[0]) - first_token(piece);
    return std::min(task_.plan.block_tokens(), rest);
  }
  // The first job from `job` on that belongs to the piece's tokens.
  std::size_t job_of_block(std::size_t job, const Piece& piece) const {
    const std::vector<Job>& jobs = task_.plan.jobs();
    while (job < jobs.size() && jobs[job].token_block != piece.job) ++job;
    return job;
  }

  // Calls add(job, strip, slice of down) in the order of the sums.
  template <class Add>
  void for_each_slice(const Piece& piece, const Add& add) const {
    const std::size_t jobs = task_.plan.jobs().size();
    for (std::size_t j = job_of_block(0, piece); j < jobs; j = job_of_block(j + 1, piece)) {
      for (int strip = piece.first_strip; strip < piece.end_strip; ++strip) {
        for (int slice = 0; slice < task_.weights.down_slices(); ++slice) add(j, strip, slice);
      }
    }
  }

  const Job& job_at(int job) const { return task_.plan.jobs()[static_cast<std::size_t>(job)]; }
  int shared_row(int job) const { return task_.shrinks.first_row[static_cast<std::size_t>(job)]; }

  const ForwardTask& task_;
  const JobRows rows_;
  const Expands expands_;
  const Workspace::Thread& scratch_;
  const Workspace::Shared& shared_;
  const bool has_gate_;
  int gathered_job_ = -1;  // whose rows are in scratch_
};

// Everything but the activations and LoRA: weights of one strip.
GemmArgs ThreadForward::gemm_args(const Job& job, Projection projection, int strip, float* c,
                                  int slice) const {
  const StripRef w = task_.weights.strip(job.expert, projection, strip, slice);
  GemmArgs args{};
  args.rows = job.rows;
  args.tile_rows = rows_.tile_rows(job);
  args.w_block = w.block;
  args.block_rows = w.block_rows;
  args.row_in_block = w.row_in_block;
  args.k = task_.weights.layout(projection).padded_k();
  args.w_scale = w.scales;
  args.w_sum = w.sums;
  args.c = c;
  return args;
}

GemmArgs ThreadForward::input_args(int index, Projection projection, int strip, float* c) const {
  const Job& job = job_at(index);
  GemmArgs args = gemm_args(job, projection, strip, c);
  rows_.use_input(args);
  expands_.fuse(args, job, projection, strip, rows_.shrunk_input(shared_row(index)));
  return args;
}

// C of one strip of gate or up, LoRA and bias included. `next`: the tile that is read afterwards.
void ThreadForward::project_input(int index, Projection projection, int strip, float* c,
                                  const std::uint8_t* next) const {
  const Job& job = job_at(index);
  GemmArgs args = input_args(index, projection, strip, c);
  args.next = next;
  expands_.prefetch(job, projection, strip);
  rows_.gemm_for(job).strip(args);
  finish_input(index, projection, strip, c);
}

void ThreadForward::finish_input(int index, Projection projection, int strip, float* c) const {
  const Job& job = job_at(index);
  expands_.add(job, projection, strip, rows_.shrunk_input(shared_row(index)), c);
  add_bias(job, projection, strip, c);
}

void ThreadForward::add_bias(const Job& job, Projection projection, int strip, float* c) const {
  if (task_.biases == nullptr) return;
  const float* bias = task_.biases->of(job.expert, projection, strip);
  if (bias != nullptr) task_.kernels.elementwise->add_bias(bias, job.rows, c);
}

// Makes the intermediate activations of one strip of its C, [rows][32] each: the strip is one step
// of a tile where the job's activations are in tile order. Without a gate, `all_gate` is not read.
void ThreadForward::activate(const Job& job, int strip, const float* all_gate,
                             const float* all_up) const {
  const ElementwiseKernels& kernels = *task_.kernels.elementwise;
  const bool silu_mul = has_gate_ && task_.activation.is_silu_mul();
  const std::int64_t act = rows_.strides().act;
  const int tile_rows = rows_.act_tile_rows(job);
  const int step = tile_rows == 1 ? job.rows : tile_rows;
  const std::int64_t stride = tile_rows == 1 ? act : kStripRows;
  std::uint16_t* const out = shared_.act + job.scratch_row * act + strip * kStripRows * tile_rows;
  for (int first = 0; first < job.rows; first += step) {
    const int rows = std::min(step, job.rows - first);
    const float* gate = has_gate_ ? all_gate + first * kStripRows : nullptr;
    const float* up = all_up + first * kStripRows;
    if (silu_mul) {
      kernels.silu_mul(gate, up, rows, out + first * act, stride);
    } else {
      kernels.activate(task_.activation, gate, up, rows, out + first * act, stride);
    }
  }
}

// Into the thread's own memory, which holds one job at a time.
void ThreadForward::gather(int job) {
  if (gathered_job_ == job) return;
  gathered_job_ = job;
  rows_.gather(job_at(job));
  if (shared_row(job) < 0) rows_.shrink_input(job_at(job));
}

void ThreadForward::shrink_input(const Piece& piece) {
  gather(piece.job);
  for (int block = piece.first_strip; block < piece.end_strip; ++block) {
    rows_.shrink_input_block(job_at(piece.job),
                             task_.shrinks.blocks[static_cast<std::size_t>(block)],
                             shared_row(piece.job));
  }
  task_.shrunk_blocks[piece.job].fetch_add(piece.end_strip - piece.first_strip,
                                           std::memory_order_release);
}

// Every block was claimed before the first strip was, so this is microseconds, unless a thread lost
// its core: then others may need this one.
void ThreadForward::await_shrink(int job) const {
  constexpr int kPausesPerYield = 256;
  if (shared_row(job) < 0) return;
  const int blocks = task_.shrinks.job_blocks[static_cast<std::size_t>(job)];
  for (int pauses = 1; task_.shrunk_blocks[job].load(std::memory_order_acquire) < blocks;
       ++pauses) {
    if (pauses % kPausesPerYield == 0) {
      std::this_thread::yield();
    } else {
      __builtin_ia32_pause();
    }
  }
}

void ThreadForward::gate_up(const Piece& piece) {
  const Job& job = job_at(piece.job);
  gather(piece.job);
  await_shrink(piece.job);
  if (job.rows <= rows_.gemm_for(job).side_rows) {
    gate_up_few_rows(piece);
  } else {
    gate_up_strips(piece);
  }
  const int done = piece.end_strip - piece.first_strip;
  const int before = task_.finished_strips[piece.job].fetch_add(done, std::memory_order_acq_rel);
  if (before + done == task_.weights.layout(Projection::kUp).strips()) {
    rows_.finish_activations(job);
  }
}

void ThreadForward::gate_up_strips(const Piece& piece) const {
  const Job& job = job_at(piece.job);
  const auto first_tile = [&](Projection projection, int strip) {
    return task_.weights.strip(job.expert, projection, strip).first_tile;
  };
  const Projection first = has_gate_ ? Projection::kGate : Projection::kUp;
  for (int strip = piece.first_strip; strip < piece.end_strip; ++strip) {
    if (has_gate_) {
      project_input(piece.job, Projection::kGate, strip, scratch_.c,
                    first_tile(Projection::kUp, strip));
    }
    const bool last = strip + 1 == piece.end_strip;
    project_input(piece.job, Projection::kUp, strip, scratch_.c_up,
                  last ? nullptr : first_tile(first, strip + 1));
    activate(job, strip, scratch_.c, scratch_.c_up);
  }
}

// Several strips of gate and up side by side.
void ThreadForward::gate_up_few_rows(const Piece& piece) const {
  const Job& job = job_at(piece.job);
  const int step = side_strips(job.rows) / (has_gate_ ? 2 : 1);
  const int sums = job.rows * kStripRows;
  GemmArgs args[kMaxSideStrips];
  for (int strip = piece.first_strip; strip < piece.end_strip; strip += step) {
    const int strips = std::min(step, piece.end_strip - strip);
    int count = 0;
    for (int i = 0; i < strips; ++i) {
      const auto add = [&](Projection projection, float* c) {
        args[count++] = input_args(piece.job, projection, strip + i, c + i * sums);
        expands_.prefetch(job, projection, strip + i);
      };
      if (has_gate_) add(Projection::kGate, scratch_.c);
      add(Projection::kUp, scratch_.c_up);
    }
    rows_.gemm_for(job).side_by_side(args, count);
    for (int i = 0; i < strips; ++i) {
      float* gate = scratch_.c + i * sums;
      float* up = scratch_.c_up + i * sums;
      if (has_gate_) finish_input(piece.job, Projection::kGate, strip + i, gate);
      finish_input(piece.job, Projection::kUp, strip + i, up);
      activate(job, strip + i, gate, up);
    }
  }
}

// The tile that is read after one slice of one strip of a job; null at the end of the piece.
const std::uint8_t* ThreadForward::tile_after(std::size_t job, int strip, int slice,
                                              const Piece& piece) const {
  const std::vector<Job>& jobs = task_.plan.jobs();
  if (++slice == task_.weights.down_slices()) {
    slice = 0;
    if (++strip == piece.end_strip) {
      strip = piece.first_strip;
      job = job_of_block(job + 1, piece);
      if (job == jobs.size()) return nullptr;
    }
  }
  return task_.weights.strip(jobs[job].expert, Projection::kDown, strip, slice).first_tile;
}

// Sums of all jobs for the piece's tokens and output columns, then their conversion.
void ThreadForward::down(const Piece& piece) const {
  const std::int64_t columns =
      static_cast<std::int64_t>(piece.end_strip - piece.first_strip) * kStripRows;
  std::memset(scratch_.out, 0, static_cast<std::size_t>(tokens(piece) * columns) * sizeof(float));
  add_down(piece);
  store_group(piece);
}

GemmArgs ThreadForward::down_args(const Job& job, int strip, int slice, float* c) const {
  GemmArgs args = gemm_args(job, Projection::kDown, strip, c, slice);
  rows_.use_activations(args, job, slice);
  if (slice == 0) {
    expands_.fuse(args, job, Projection::kDown, strip, rows_.shrunk_activations(job));
  }
  return args;
}

void ThreadForward::finish_down(const Piece& piece, const Job& job, int strip, int slice,
                                float* c) const {
  const std::int64_t columns =
      static_cast<std::int64_t>(piece.end_strip - piece.first_strip) * kStripRows;
  if (slice == 0) {
    expands_.add(job, Projection::kDown, strip, rows_.shrunk_activations(job), c);
    add_bias(job, Projection::kDown, strip, c);
  }
  float* out = scratch_.out + (strip - piece.first_strip) * kStripRows;
  add_weighted(job, c, out, first_token(piece), columns);
}

void ThreadForward::add_down_strip(const Piece& piece, std::size_t j, int strip, int slice) const {
  const Job& job = task_.plan.jobs()[j];
  GemmArgs args = down_args(job, strip, slice, scratch_.c);
  args.next = tile_after(j, strip, slice, piece);
  args.cold_rows = strip == piece.first_strip;
  if (slice == 0) expands_.prefetch(job, Projection::kDown, strip);
  rows_.gemm_for(job).strip(args);
  finish_down(piece, job, strip, slice, scratch_.c);
}

// Strips of few rows side by side, of several jobs of as many rows where the piece has few of each;
// added up in the same order.
void ThreadForward::add_down(const Piece& piece) const {
  struct Part {
    const Job* job;
    int strip, slice;
  };
  GemmArgs args[kMaxSideStrips];
  Part parts[kMaxSideStrips];
  int count = 0;
  const auto run = [&] {
    if (count == 0) return;
    rows_.gemm_for(*parts[0].job).side_by_side(args, count);
    for (int i = 0; i < count; ++i) {
      finish_down(piece, *parts[i].job, parts[i].strip, parts[i].slice, args[i].c);
    }
    count = 0;
  };
  for_each_slice(piece, [&](std::size_t j, int strip, int slice) {
    const Job& job = task_.plan.jobs()[j];
    if (count > 0 && parts[0].job->rows != job.rows) run();
    if (job.rows > rows_.gemm_for(job).side_rows) return add_down_strip(piece, j, strip, slice);
    args[count] = down_args(job, strip, slice, scratch_.c + count * job.rows * kStripRows);
    if (slice == 0) expands_.prefetch(job, Projection::kDown, strip);
    parts[count] = {&job, strip, slice};
    if (++count == side_strips(job.rows)) run();
  });
  run();
}

// C times the routing weights, to the sums of the job's tokens. `out`: the strip's place in the
// first token's.
void ThreadForward::add_weighted(const Job& job, const float* c, float* out, int first_token,
                                 std::int64_t columns) const {
  constexpr int kAhead = 6;
  const PlanRow* rows = task_.plan.rows().data() + job.first_row;
  for (int r = 0; r < job.rows; ++r) {
    if (r + kAhead < job.rows) {
      const float* coming = out + (rows[r + kAhead].token - first_token) * columns;
      __builtin_prefetch(coming, 1, 3);
      __builtin_prefetch(coming + 16, 1, 3);
    }
    task_.kernels.elementwise->weighted_add(c + r * kStripRows, rows[r].weight,
                                            out + (rows[r].token - first_token) * columns);
  }
}

void ThreadForward::store_group(const Piece& piece) const {
  const int columns = (piece.end_strip - piece.first_strip) * kStripRows;
  const int first_column = piece.first_strip * kStripRows;
  const int first = first_token(piece);
  const int valid = std::min(columns, task_.weights.shape().hidden_size - first_column);
  const TensorView& out = task_.out;
  for (std::int64_t token = 0; token < tokens(piece); ++token) {
    const float* sums = scratch_.out + token * columns;
    std::byte* row = out.mutable_row(first + token) +
                     static_cast<std::size_t>(first_column) * size_of(out.dtype);
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

// Every piece reads all activations of its tokens, for a job of r rows as many bytes as the weights
// of r/32 strips: pieces of one strip spent half of a layer's time there (256 rows, 2 threads).
ColumnCut cut_columns(const DispatchPlan& plan) {
  // Activations are then two thirds of a piece's reads, at most; more strips would leave nothing to
  // share at the end, or threads without work.
  constexpr int kRowsPerStrip = 64;
  const std::size_t strip_bytes =
      static_cast<std::size_t>(plan.block_tokens()) * kStripRows * sizeof(float);
  const auto fitting = static_cast<int>(kOutputBlockBytes / strip_bytes);
  const auto jobs = std::max<std::size_t>(1, plan.jobs().size());
  const auto rows = static_cast<int>(plan.rows().size() / jobs);
  return {plan.token_blocks(), std::max(1, fitting), std::max(1, rows / kRowsPerStrip)};
}

}  // namespace

void run_forward(const ForwardTask& task, ThreadPool& pool) {
  const std::int64_t qlen = task.out.shape[0];
  if (qlen == 0) return;
  const ColumnCut columns = cut_columns(task.plan);
  const int parts = task.weights.parts();
  const int threads_per_part = std::max(1, pool.size() / parts);
  for (int p = 0; p < parts; ++p) {
    const auto strips = [&](Projection projection) {
      return StripRange{task.weights.first_strip(projection, p),
                        task.weights.first_strip(projection, p + 1)};
    };
    PartQueues& queues = task.queues[static_cast<std::size_t>(p)];
    schedule_jobs(task.plan.jobs(), strips(Projection::kUp), threads_per_part, queues.gate_up);
    schedule_columns(strips(Projection::kDown), columns, threads_per_part, queues.down);
  }
  schedule_shrinks(task.plan, task.mixes, pool.size(), kSharedInputRows, task.shrinks);
  pool.run([&](int thread) {
    ThreadForward forward(task, thread);
    while (const Piece* piece = task.shrinks.pieces.claim()) forward.shrink_input(*piece);
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
