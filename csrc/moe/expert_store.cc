#include "moe/expert_store.h"

#include <atomic>
#include <utility>

#include "base/check.h"

namespace ktrt {

ExpertStore::ExpertStore(std::shared_ptr<Engine> engine, const MoeShape& shape, WeightFormat format,
                         int down_slices)
    : engine_(std::move(engine)), shape_(shape), format_(format), down_slices_(down_slices) {
  KTRT_CHECK(engine_ != nullptr, "engine is missing");
  weights_ = std::make_shared<ExpertWeights>(shape, format, engine_->parts(), down_slices);
}

void ExpertStore::release() {
  weights_.reset();
  biases_.reset();
}

void ExpertStore::load_expert(int expert, const std::optional<TensorView>& gate,
                              const TensorView& up, const TensorView& down) {
  check_expert(expert);
  check_gate(gate.has_value());
  if (gate) {
    gate->expect_float();
    gate->expect_shape({shape_.intermediate_size, shape_.hidden_size});
  }
  for (const TensorView* view : {&up, &down}) view->expect_float();
  up.expect_shape({shape_.intermediate_size, shape_.hidden_size});
  down.expect_shape({shape_.hidden_size, shape_.intermediate_size});

  const auto lease = engine_->lease();
  weights_->allocate();
  weights_->set_loaded(expert, false);
  if (gate) pack(lease.pool(), expert, Projection::kGate, *gate);
  pack(lease.pool(), expert, Projection::kUp, up);
  pack(lease.pool(), expert, Projection::kDown, down);
  weights_->set_loaded(expert, true);
}

void ExpertStore::load_coded_expert(int expert, const std::optional<CodedSource>& gate,
                                    const CodedSource& up, const CodedSource& down) {
  check_expert(expert);
  check_gate(gate.has_value());
  if (gate) check_coded(*gate, format_, shape_.intermediate_size, shape_.hidden_size);
  check_coded(up, format_, shape_.intermediate_size, shape_.hidden_size);
  check_coded(down, format_, shape_.hidden_size, shape_.intermediate_size);

  const auto lease = engine_->lease();
  weights_->allocate();
  weights_->set_loaded(expert, false);
  if (gate) pack_coded(lease.pool(), expert, Projection::kGate, *gate);
  pack_coded(lease.pool(), expert, Projection::kUp, up);
  pack_coded(lease.pool(), expert, Projection::kDown, down);
  weights_->set_loaded(expert, true);
}

void ExpertStore::check_gate(bool given) const {
  KTRT_CHECK(given == shape_.has_gate, "gate is " << (given ? "given" : "missing")
                                                  << ", but the experts have "
                                                  << (shape_.has_gate ? "one" : "none"));
}

void ExpertStore::check_expert(int expert) const {
  KTRT_CHECK(expert >= 0 && expert < shape_.num_experts,
             "expert is " << expert << ", expected 0 to " << shape_.num_experts - 1);
}

// Every thread packs strips of its home part, so that their pages lie on its NUMA node.
template <class Pack>
bool ExpertStore::for_each_strip(ThreadPool& pool, int expert, Projection projection,
                                 const Pack& pack) {
  std::vector<std::atomic<int>> next(static_cast<std::size_t>(weights_->parts()));
  std::atomic<bool> good{true};
  pool.run([&](int thread) {
    const int part = engine_->home()[static_cast<std::size_t>(thread)];
    const PackedLayout layout = weights_->matrix(expert, projection, part).layout;
    const int first_row = weights_->first_strip(projection, part) * kStripRows;
    std::atomic<int>& claim = next[static_cast<std::size_t>(part)];
    for (int s = claim++; s < layout.strips(); s = claim++) {
      for (int slice = 0; slice < weights_->slices(projection); ++slice) {
        const PackedMatrix matrix = weights_->matrix(expert, projection, part, slice);
        if (!pack(matrix, s, first_row, slice)) good.store(false, std::memory_order_relaxed);
      }
    }
  });
  return good.load();
}

void ExpertStore::pack(ThreadPool& pool, int expert, Projection projection,
                       const TensorView& source) {
  const bool finite = for_each_strip(
      pool, expert, projection,
      [&](const PackedMatrix& matrix, int strip, int first_row, int slice) {
        TensorView rows = source;
        rows.data = source.mutable_row(first_row) +
                    static_cast<std::size_t>(slice * matrix.layout.k()) * size_of(source.dtype);
        return pack_strip(rows, matrix, strip);
      });
  KTRT_CHECK(finite, source.name << " of expert " << expert
                                 << " holds NaN or infinity; the weights are damaged");
}

void ExpertStore::pack_coded(ThreadPool& pool, int expert, Projection projection,
                             const CodedSource& source) {
  const bool finite = for_each_strip(
      pool, expert, projection, [&](const PackedMatrix& matrix, int strip, int first_row, int) {
        return pack_coded_strip(source, first_row, matrix, strip);
      });
  KTRT_CHECK(finite, source.codes.name
                         << " of expert " << expert
                         << ": a code is NaN, or a scale not finite or too large; the weights are "
                            "damaged");
}

void ExpertStore::set_biases(const std::optional<TensorView>& gate,
                             const std::optional<TensorView>& up,
                             const std::optional<TensorView>& down) {
  auto biases = std::make_shared<const ExpertBiases>(shape_, gate, up, down);
  const auto lease = engine_->lease();
  biases_ = std::move(biases);
}

std::size_t ExpertStore::packed_bytes() const {
  const auto lock = engine_->lock();
  return weights_ ? weights_->packed_bytes() : 0;
}

std::vector<std::uint8_t> ExpertStore::packed_codes(int expert, Projection projection) {
  const auto lease = engine_->lease();
  check_loaded(expert);
  std::vector<std::uint8_t> codes;
  for (int part = 0; part < weights_->parts(); ++part) {
    for (int slice = 0; slice < weights_->slices(projection); ++slice) {
      const PackedMatrix matrix = weights_->matrix(expert, projection, part, slice);
      codes.insert(codes.end(), matrix.codes, matrix.codes + matrix.layout.code_bytes());
    }
  }
  return codes;
}

std::vector<float> ExpertStore::packed_scales(int expert, Projection projection) {
  const auto lease = engine_->lease();
  check_loaded(expert);
  std::vector<float> scales;
  for (int part = 0; part < weights_->parts(); ++part) {
    for (int slice = 0; slice < weights_->slices(projection); ++slice) {
      const PackedMatrix matrix = weights_->matrix(expert, projection, part, slice);
      if (matrix.scales == nullptr) continue;
      scales.insert(scales.end(), matrix.scales, matrix.scales + matrix.layout.scales());
    }
  }
  return scales;
}

std::shared_ptr<const ExpertWeights> ExpertStore::share_weights() {
  const auto lease = engine_->lease();
  check_all_loaded();
  return weights_;
}

std::shared_ptr<const ExpertBiases> ExpertStore::share_biases() const {
  const auto lock = engine_->lock();
  return biases_;
}

bool ExpertStore::has_biases() const { return share_biases() != nullptr; }

void ExpertStore::check_all_loaded() const {
  KTRT_CHECK(weights_->all_loaded(),
             "expert " << weights_->first_missing() << " has not been loaded");
}

void ExpertStore::check_loaded(int expert) const {
  KTRT_CHECK(expert >= 0 && expert < shape_.num_experts && weights_->loaded(expert),
             "expert " << expert << " has not been loaded");
}

}  // namespace ktrt
