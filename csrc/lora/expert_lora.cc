#include "lora/expert_lora.h"

#include <string>

#include "base/bf16.h"
#include "base/check.h"

namespace ktrt {

namespace {

constexpr int kInputMultiple = 32;

void check_array(const TensorView& array, int num_experts, std::int64_t rows,
                 std::int64_t columns) {
  KTRT_CHECK(array.dtype == DType::kFloat32,
             array.name << " is " << name_of(array.dtype) << ", expected float32");
  array.expect_shape({num_experts, rows, columns});
}

// Rank of a pair, 0 if absent; checks that A and B belong together. `shared_a` stands in for a
// missing A.
int check_pair(const MoeShape& shape, const char* name, const LoraPair& pair,
               const std::optional<TensorView>& shared_a, int in, int out) {
  if (!pair.a && !pair.b) return 0;
  KTRT_CHECK(pair.b.has_value(), name << "_a is given without " << name << "_b");
  const std::optional<TensorView>& a = pair.a ? pair.a : shared_a;
  KTRT_CHECK(a.has_value(), name << "_b is given without " << name << "_a");
  KTRT_CHECK(a->ndim == 3,
             a->name << " has shape " << a->shape_string() << ", expected [num_experts, rank, in]");
  const std::int64_t rank = a->shape[1];
  KTRT_CHECK(rank >= 1 && rank <= ExpertLora::kMaxRank,
             a->name << " has rank " << rank << ", expected 1 to " << ExpertLora::kMaxRank);
  check_array(*a, shape.num_experts, rank, in);
  check_array(*pair.b, shape.num_experts, out, rank);
  return static_cast<int>(rank);
}

int even(int rank) { return round_up(rank, 2); }

// Writes ranks [first, first + rank) of every expert's A.
void pack_a(const TensorView& a, const MoeShape& shape, const ExpertLora::Shrink& shrink,
            int first) {
  const int rank = static_cast<int>(a.shape[1]);
  const int in = static_cast<int>(a.shape[2]);
  for (int e = 0; e < shape.num_experts; ++e) {
    auto* out = const_cast<std::uint16_t*>(shrink.of(e));
    const TensorView expert = a.slice(e);
    for (int r = 0; r < rank; ++r) {
      const auto* row = reinterpret_cast<const float*>(expert.row(r));
      const int block = (first + r) / ExpertLora::kBlockRanks;
      const int lane = (first + r) % ExpertLora::kBlockRanks;
      auto* base = out + static_cast<std::size_t>(block) * ExpertLora::kBlockRanks *
                             static_cast<std::size_t>(shrink.k);
      for (int k = 0; k < in; ++k) {
        base[(k / 2) * 2 * ExpertLora::kBlockRanks + lane * 2 + k % 2] = f32_to_bf16(row[k]);
      }
    }
  }
}

ExpertLora::Shrink make_shrink(int num_experts, int ranks, int in) {
  ExpertLora::Shrink shrink;
  shrink.blocks = round_up(ranks, ExpertLora::kBlockRanks) / ExpertLora::kBlockRanks;
  shrink.k = round_up(in, kInputMultiple);
  shrink.a = AlignedBuffer(static_cast<std::size_t>(num_experts) *
                           static_cast<std::size_t>(shrink.width()) *
                           static_cast<std::size_t>(shrink.k) * sizeof(bf16_t));
  return shrink;
}

}  // namespace

ExpertLora::Expand& ExpertLora::new_expand(const MoeShape& shape, Projection projection,
                                           int rank_pairs, int t_offset) {
  Expand& expand = expands_[static_cast<std::size_t>(projection)];
  const int out = projection == Projection::kDown ? shape.hidden_size : shape.intermediate_size;
  expand.rank_pairs = rank_pairs;
  expand.t_offset = t_offset;
  expand.strips = round_up(out, kStripRows) / kStripRows;
  expand.b =
      AlignedBuffer(static_cast<std::size_t>(shape.num_experts * expand.strips) *
                    static_cast<std::size_t>(expand.rank_pairs) * 2 * kStripRows * sizeof(bf16_t));
  return expand;
}

void ExpertLora::pack_expand(const MoeShape& shape, Projection projection, const TensorView& b,
                             int t_offset) {
  const int out = static_cast<int>(b.shape[1]);
  const int rank = static_cast<int>(b.shape[2]);
  const Expand& expand = new_expand(shape, projection, even(rank) / 2, t_offset);
  for (int e = 0; e < shape.num_experts; ++e) {
    const TensorView expert = b.slice(e);
    for (int n = 0; n < out; ++n) {
      const auto* row = reinterpret_cast<const float*>(expert.row(n));
      auto* strip = const_cast<std::uint16_t*>(expand.of(e, n / kStripRows));
      for (int r = 0; r < rank; ++r) {
        strip[(r / 2) * 2 * kStripRows + (n % kStripRows) * 2 + r % 2] = f32_to_bf16(row[r]);
      }
    }
  }
}

ExpertLora::ExpertLora(const MoeShape& shape, const LoraPair& gate, const LoraPair& up,
                       const LoraPair& down) {
  const int h = shape.hidden_size;
  const int i = shape.intermediate_size;
  KTRT_CHECK(shape.has_gate || (!gate.a && !gate.b),
             "LoRA of gate is given, but the experts have no gate");
  const int gate_rank = check_pair(shape, "gate", gate, std::nullopt, h, i);
  const int up_rank = check_pair(shape, "up", up, gate.a, h, i);
  const int down_rank = check_pair(shape, "down", down, std::nullopt, i, h);

  const int own_up_ranks = up.a ? up_rank : 0;
  input_shrink_ = make_shrink(shape.num_experts, even(gate_rank) + own_up_ranks, h);
  if (gate_rank > 0) {
    pack_a(*gate.a, shape, input_shrink_, 0);
    pack_expand(shape, Projection::kGate, *gate.b, 0);
  }
  if (up_rank > 0) {
    const int first = up.a ? even(gate_rank) : 0;
    if (up.a) pack_a(*up.a, shape, input_shrink_, first);
    pack_expand(shape, Projection::kUp, *up.b, first);
  }
  down_shrink_ = make_shrink(shape.num_experts, down_rank, i);
  if (down_rank > 0) {
    pack_a(*down.a, shape, down_shrink_, 0);
    pack_expand(shape, Projection::kDown, *down.b, 0);
  }
}

std::size_t ExpertLora::bytes() const {
  std::size_t sum = input_shrink_.a.page_bytes() + down_shrink_.a.page_bytes();
  for (const Expand& expand : expands_) sum += expand.b.page_bytes();
  return sum;
}

}  // namespace ktrt
