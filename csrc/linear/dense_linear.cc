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

constexpr std::int64_t kLineValues = 32;

// Shrunk rows of the forward that runs; its caller's, so that it is allocated once.
std::uint16_t* shrunk_rows(std::size_t count) {
  thread_local std::vector<std::uint16_t> rows;
  rows.assign(count, 0);
  return rows.data();
}

}  // namespace

struct DenseLinear::Task {
  const std::uint16_t* x;
  std::uint16_t* out;
  std::uint16_t* t = nullptr;  // BF16 [rows][t_stride]
  std::int64_t t_stride = 0;   // of the widest mix; 0 where no row has LoRA
  bool on_tiles = false;       // the LoRA, before the epilogue
};

DenseLinear::DenseLinear(std::shared_ptr<Engine> engine, const TensorView& weight,
                         const std::optional<TensorView>& bias)
    : engine_(std::move(engine)) {
  KTRT_CHECK(engine_ != nullptr, "engine is missing");
  check_weight(weight);
  out_ = weight.shape[0];
  in_ = weight.shape[1];
  weight_ = static_cast<const std::uint16_t*>(weight.data);
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

void DenseLinear::load_empty_lora(int number) {
  const auto lease = engine_->lease();
  loras_.put(number, std::make_shared<const Lora>());
}

void DenseLinear::unload_lora(int number) {
  const auto lease = engine_->lease();
  loras_.remove(number);
}

void DenseLinear::activate_loras(std::span<const int> numbers, std::span<const float> weights) {
  const auto lease = engine_->lease();
  loras_.activate(numbers, weights);
}

std::size_t DenseLinear::lora_bytes() const {
  const auto lock = engine_->lock();
  return loras_.bytes();
}

// Adds bias and each row's LoRA, and rounds.
class DenseLinear::Epilogue {
 public:
  Epilogue(const DenseLinear& linear, const Task& task) : linear_(linear), task_(task) {}

  // B is read after the panel, and lies elsewhere.
  void start(std::int64_t first, int columns) const {
    if (task_.on_tiles) return;  // added already
    for (const DenseLoraB& part : linear_.expands_) {
      for (int pair = 0; pair < part.rank_pairs; ++pair) {
        const std::uint16_t* b = part.b + 2 * (pair * linear_.out_ + first);
        for (int i = 0; i < 2 * columns; i += kLineValues) __builtin_prefetch(b + i, 0, 2);
      }
    }
  }

  void finish(std::int64_t row, int rows, std::int64_t first, int columns, const float* c) const {
    finish(row, rows, first, columns, c, columns);
  }
  void finish(std::int64_t row, int rows, std::int64_t first, int columns, const float* c,
              std::int64_t c_stride) const {
    const auto mix_of = [&](int r) {
      return linear_.chosen_.of_row[static_cast<std::size_t>(row + r)];
    };
    for (int r = 0, end = 0; r < rows; r = end) {
      const int mix = mix_of(r);
      for (end = r + 1; end < rows && mix_of(end) == mix;) ++end;
      DenseFinishArgs run{};
      run.c = c + r * c_stride;
      run.c_stride = c_stride;
      run.rows = end - r;
      run.columns = columns;
      finish_run(run, row + r, mix, first);
    }
  }

 private:
  // Rows of one mix from `row` on, columns from `first` on.
  void finish_run(DenseFinishArgs& run, std::int64_t row, int mix, std::int64_t first) const {
    run.bias = linear_.bias_.empty() ? nullptr : linear_.bias_.as<float>() + first;
    if (task_.t_stride > 0 && !task_.on_tiles) {
      const int* const part = linear_.first_expand_.data() + mix;
      run.lora_b = linear_.expands_.data() + part[0];
      run.loras = part[1] - part[0];
      run.outputs = linear_.out_;
      run.first_output = first;
      run.t = task_.t + row * task_.t_stride;
      run.t_stride = task_.t_stride;
    }
    run.out = task_.out + row * linear_.out_ + first;
    run.out_stride = linear_.out_;
    linear_.engine_->kernels().dense_bf16->finish(run);
  }

  const DenseLinear& linear_;
  const Task& task_;
};

// Which ranks of which rows are to be shrunk, where they go in T, and each mix's B.
void DenseLinear::plan(std::int64_t rows, Task& task) {
  shrinks_.clear();
  expands_.clear();
  if (chosen_.silent()) return;
  first_expand_.assign(1, 0);
  for (const Loras::Mix& mix : chosen_.mixes) {
    std::int64_t width = 0;
    for (const Loras::Part& part : mix) {
      expands_.push_back({part.lora->b.as<std::uint16_t>(), part.lora->rank_pairs});
      width += 2 * part.lora->rank_pairs;
    }
    first_expand_.push_back(static_cast<int>(expands_.size()));
    task.t_stride = std::max(task.t_stride, width);
  }
  // Tiles take 32 values of each of 16 rows.
  task.t_stride = (task.t_stride + kLineValues - 1) / kLineValues * kLineValues;
  task.t = shrunk_rows(static_cast<std::size_t>((rows + kMaxTileRows) * task.t_stride));
  groups_.clear();
  groups_.add(chosen_.of_row, static_cast<int>(chosen_.mixes.size()), 0, rows,
              engine_->kernels().dense_bf16->block_rows);
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    std::int64_t offset = 0;
    for (const Loras::Part& part : chosen_.mixes[static_cast<std::size_t>(groups_[i].mix)]) {
      shrinks_.push_back({groups_[i], &part, offset});
      offset += 2 * part.lora->rank_pairs;
    }
  }
}

// A thread's share: of the groups of rows, or where there are few, of every group's ranks.
void DenseLinear::shrink(const Task& task, int threads, int thread) const {
  const auto share = [&](std::int64_t count) {
    return DenseRange{count * thread / threads, count * (thread + 1) / threads};
  };
  const auto count = static_cast<std::int64_t>(shrinks_.size());
  const bool by_rows = count >= 2 * threads;
  const DenseRange groups = by_rows ? share(count) : DenseRange{0, count};
  const Loras::Part* last = nullptr;
  for (std::int64_t i = groups.begin; i < groups.end; ++i) {
    const Shrink& each = shrinks_[static_cast<std::size_t>(i)];
    const int rank = each.part->lora->rank;
    shrink_group(task, each, by_rows ? DenseRange{0, rank} : share(rank), each.part != last);
    last = each.part;
  }
}

// Some ranks of T for one group of rows.
void DenseLinear::shrink_group(const Task& task, const Shrink& shrink, DenseRange ranks,
                               bool cold) const {
  const DenseKernel& kernel = *engine_->kernels().dense_bf16;
  const Lora& lora = *shrink.part->lora;
  float c[kMaxDenseBlockRows * kMaxPanelColumns];
  for (std::int64_t rank = ranks.begin; rank < ranks.end; rank += kMaxPanelColumns) {
    DenseDotArgs dot{};
    dot.x = task.x + shrink.rows.first * in_;
    dot.x_stride = shrink.rows.step * in_;
    dot.w_stride = in_;
    dot.last = true;
    dot.rows = shrink.rows.rows;
    dot.w = lora.a.as<std::uint16_t>() + rank * in_;
    dot.columns = static_cast<int>(std::min<std::int64_t>(kMaxPanelColumns, ranks.end - rank));
    dot.k = static_cast<int>(in_);
    if (cold) prefetch_own(dot);
    dot.c = c;
    dot.c_stride = dot.columns;
    kernel.dot(dot);
    if (shrink.part->weight != 1.0f) {
      for (int i = 0; i < dot.rows * dot.columns; ++i) c[i] *= shrink.part->weight;
    }
    DenseFinishArgs finish{};
    finish.c = c;
    finish.c_stride = dot.columns;
    finish.rows = dot.rows;
    finish.columns = dot.columns;
    finish.out = task.t + shrink.rows.first * task.t_stride + shrink.t_offset + rank;
    finish.out_stride = shrink.rows.step * task.t_stride;
    kernel.finish(finish);
  }
}

// The LoRA that all rows have. Null where they have several or none, and with fixed kernels, since
// a row's company must not decide by which of the two ways it is added.
const DenseTileLora* DenseLinear::plan_tiles(const Task& task) {
  if (task.t_stride == 0 || chosen_.mixes.size() != 1 || engine_->kernels().fixed) return nullptr;
  tile_lora_.parts.clear();
  tile_lora_.rank_pairs = 0;
  for (const Loras::Part& part : chosen_.mixes[0]) {
    const Lora& lora = *part.lora;
    if (lora.rank == 0) continue;
    tile_lora_.parts.push_back({lora.a.as<std::uint16_t>(), lora.b.as<std::uint16_t>(), lora.rank,
                                lora.rank_pairs, part.weight});
    tile_lora_.rank_pairs += lora.rank_pairs;
  }
  tile_lora_.t = task.t;
  tile_lora_.t_stride = task.t_stride;
  return tile_lora_.parts.empty() ? nullptr : &tile_lora_;
}

void DenseLinear::forward(const std::uint16_t* x, std::int64_t x_count, std::uint16_t* out,
                          std::int64_t out_count, const AdapterIds& adapters) {
  const std::int64_t rows = check_rows(x, x_count, out, out_count, in_, out_);
  check_adapter_ids(adapters);
  if (rows == 0) return;
  const auto lease = engine_->lease();
  loras_.choose(adapters, rows, chosen_);
  Task task{x, out};
  plan(rows, task);
  const KernelTable& kernels = engine_->kernels();
  const bool many = DenseTiles::take(kernels, rows, in_);
  const DenseTileLora* const tile_lora = many ? plan_tiles(task) : nullptr;
  task.on_tiles = tile_lora != nullptr;
  const bool has_before = task.t_stride > 0 && !task.on_tiles;
  const auto before = [&](int threads, int thread) {
    if (has_before) shrink(task, threads, thread);
  };
  const Epilogue epilogue(*this, task);
  if (many) {
    const DenseTiles tiles(kernels, weight_, out_, in_);
    return tiles.multiply(lease, queue_, x, rows, tile_lora, before, epilogue);
  }
  const DensePanels<std::uint16_t, DenseKernel> panels(*kernels.dense_bf16, weight_, out_, in_);
  panels.multiply(lease, queue_, x, rows, has_before, before, epilogue);
}

}  // namespace ktrt
