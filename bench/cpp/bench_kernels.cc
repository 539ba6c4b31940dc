// Every kernel variant that this machine can run, on DeepSeek-V2-Lite's shapes, weights in the L2
// cache: the arithmetic limit. GFLOP/s counts the base GEMM; GB/s the weights read.

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "base/aligned_buffer.h"
#include "kernels/select.h"
#include "layout/packed_layout.h"

namespace ktrt {
namespace {

constexpr int kK = 2048;
constexpr int kN = 1408;
constexpr int kStripsInCache = 4;  // 512 KB in BF16
constexpr int kMaxRank = 64;

template <class Value>
struct Array {
  // Written with small finite values of every type: untouched pages are all one page of zeros,
  // which stays in the L1 cache whatever their number.
  explicit Array(std::size_t count) : memory(round_up(count * sizeof(Value), kCacheLine)) {
    std::memset(memory.as<std::byte>(), 0x3c, memory.bytes());
  }
  Value* data() const { return memory.as<Value>(); }
  AlignedBuffer memory;
};

void gemm(benchmark::State& state, const GemmKernel* kernel, WeightFormat format) {
  const int rows = static_cast<int>(state.range(0));
  const int rank = static_cast<int>(state.range(1));
  const PackedLayout layout(format, kN, kK);
  const int value_bytes = quantizes_rows(format) ? 1 : 2;
  const std::int64_t stride = layout.padded_k() * value_bytes + 64;
  const auto count = static_cast<std::size_t>(rows);
  const Array<std::uint8_t> w(layout.code_bytes());
  const Array<std::uint8_t> a((count + kMaxTileRows) * static_cast<std::size_t>(stride));
  const Array<float> scales(kN);
  const Array<std::int32_t> sums(kN);
  const Array<float> a_scales(count);
  const Array<std::uint16_t> lora_b(kMaxRank * kStripRows);
  const Array<std::uint16_t> t((count + kMaxTileRows) * kMaxRank);
  const Array<float> c((count + kMaxTileRows) * kStripRows);
  for (auto _ : state) {
    for (int strip = 0; strip < kStripsInCache; ++strip) {
      GemmArgs g{};
      g.a = a.data();
      g.tile_rows = kernel->tile_rows(rows);
      g.a_stride = stride * g.tile_rows;
      g.a_scale = a_scales.data();
      g.rows = rows;
      g.w_block = w.data() + layout.block_offset(strip);
      g.block_rows = layout.block_rows(strip);
      g.row_in_block = layout.row_in_block(strip);
      g.k = layout.padded_k();
      g.w_scale = scales.data() + strip * kStripRows;
      g.w_sum = sums.data() + strip * kStripRows;
      g.lora_b = rank > 0 ? lora_b.data() : nullptr;
      g.t = t.data();
      g.t_stride = kMaxRank;
      g.rank_pairs = rank / 2;
      g.c = c.data();
      kernel->strip(g);
    }
    benchmark::ClobberMemory();
  }
  const double weights = static_cast<double>(kStripsInCache) * kStripRows * layout.row_bytes();
  const double flops = 2.0 * rows * kK * kStripsInCache * kStripRows;
  using benchmark::Counter;
  state.counters["GFLOP/s"] = Counter(flops / 1e9, Counter::kIsIterationInvariantRate);
  state.counters["GB/s"] = Counter(weights / 1e9, Counter::kIsIterationInvariantRate);
}

void shrink(benchmark::State& state, const ShrinkKernel* kernel) {
  const int rows = static_cast<int>(state.range(0));
  const int ranks = static_cast<int>(state.range(1));
  const auto count = static_cast<std::size_t>(rows);
  const Array<std::uint16_t> x((count + kMaxTileRows) * (kK + 32));
  const Array<std::uint16_t> a(static_cast<std::size_t>(ranks) * kK);
  const Array<std::uint16_t> t(count * static_cast<std::size_t>(ranks));
  for (auto _ : state) {
    kernel->run({x.data(), kK + 32, 1, 0, rows, a.data(), ranks / 16, kK, t.data(), ranks});
    benchmark::ClobberMemory();
  }
  using benchmark::Counter;
  const double flops = 2.0 * rows * kK * ranks;
  state.counters["GFLOP/s"] = Counter(flops / 1e9, Counter::kIsIterationInvariantRate);
}

void quantize_row(benchmark::State& state, const ElementwiseKernels* kernels) {
  const Array<std::uint16_t> x(kK);
  std::fill(x.data(), x.data() + kK, std::uint16_t{0x3f80});
  const Array<std::uint8_t> codes(kK);
  for (auto _ : state) {
    benchmark::DoNotOptimize(kernels->quantize_row(x.data(), kK, kK, 128, codes.data()));
  }
  state.SetItemsProcessed(state.iterations() * kK);
}

void f32_to_bf16(benchmark::State& state, const ElementwiseKernels* kernels) {
  const Array<float> in(kK);
  const Array<std::uint16_t> out(kK);
  for (auto _ : state) {
    kernels->f32_to_bf16(in.data(), kK, out.data());
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed(state.iterations() * kK);
}

void silu_mul(benchmark::State& state, const ElementwiseKernels* kernels) {
  constexpr int kRows = 64;
  const Array<float> gate(kRows * kStripRows);
  const Array<float> up(kRows * kStripRows);
  const Array<std::uint16_t> out(kRows * kStripRows);
  for (auto _ : state) {
    kernels->silu_mul(gate.data(), up.data(), kRows, out.data(), kStripRows);
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed(state.iterations() * kRows * kStripRows);
}

// By kind; with the limits and the offset that gpt-oss has.
void activate(benchmark::State& state, const ElementwiseKernels* kernels, ActivationKind kind) {
  constexpr int kRows = 64;
  const Activation activation{kind, 1.702f, 7.0f, 7.0f, 1.0f};
  const Array<float> gate(kRows * kStripRows);
  const Array<float> up(kRows * kStripRows);
  const Array<std::uint16_t> out(kRows * kStripRows);
  for (auto _ : state) {
    kernels->activate(activation, gate.data(), up.data(), kRows, out.data(), kStripRows);
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed(state.iterations() * kRows * kStripRows);
}

void add_bias(benchmark::State& state, const ElementwiseKernels* kernels) {
  constexpr int kRows = 64;
  const Array<float> bias(kStripRows);
  const Array<float> c(kRows * kStripRows);
  for (auto _ : state) {
    kernels->add_bias(bias.data(), kRows, c.data());
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed(state.iterations() * kRows * kStripRows);
}

void weighted_add(benchmark::State& state, const ElementwiseKernels* kernels) {
  const Array<float> c(kStripRows);
  const Array<float> acc(kStripRows);
  for (auto _ : state) {
    kernels->weighted_add(c.data(), 0.5f, acc.data());
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed(state.iterations() * kStripRows);
}

void add_gemm(const char* family, const GemmKernel* kernel, WeightFormat format) {
  const std::string name = std::string(family) + "/" + kernel->name;
  benchmark::RegisterBenchmark(name.c_str(),
                               [=](benchmark::State& state) { gemm(state, kernel, format); })
      ->ArgNames({"rows", "rank"})
      ->ArgsProduct({{1, 2, 4, 8, 14, 16, 32, 64, 128}, {0, 8, kMaxRank}});
}

// The tables that machines with this one's features, or with some of them, choose.
std::vector<KernelTable> all_tables() {
  std::vector<KernelTable> tables;
  for (const Isa level : {Isa::kPortable, Isa::kAvx2, Isa::kAvxVnni, Isa::kAvx512, Isa::kAmx}) {
    if (level > detected_isa()) break;
    for (const bool bf16 : {false, true}) {
      for (const bool vnni : {false, true}) {
        CpuFeatures features = cpu_features();
        features.avx512_bf16 = features.avx512_bf16 && bf16;
        features.avx512_vnni = features.avx512_vnni && vnni;
        tables.push_back(select_kernels(level, features));
      }
    }
  }
  return tables;
}

void add_elementwise(const ElementwiseKernels* kernels) {
  const auto add = [&](const char* stage, auto function) {
    const std::string name = std::string(stage) + "/" + kernels->name;
    benchmark::RegisterBenchmark(name.c_str(),
                                 [=](benchmark::State& state) { function(state, kernels); });
  };
  add("quantize_row", quantize_row);
  add("f32_to_bf16", f32_to_bf16);
  add("silu_mul", silu_mul);
  add("weighted_add", weighted_add);
  add("add_bias", add_bias);
  constexpr std::pair<const char*, ActivationKind> kinds[] = {
      {"activate_silu", ActivationKind::kSilu},
      {"activate_gelu", ActivationKind::kGelu},
      {"activate_gelu_tanh", ActivationKind::kGeluTanh},
      {"activate_relu2", ActivationKind::kRelu2},
      {"activate_softcap_silu", ActivationKind::kSoftcapSilu},
  };
  for (const auto& [name, kind] : kinds) {
    add(name, [kind = kind](benchmark::State& state, const ElementwiseKernels* table) {
      activate(state, table, kind);
    });
  }
}

void add_shrink(const ShrinkKernel* kernel) {
  const std::string name = std::string("lora_shrink/") + kernel->name;
  benchmark::RegisterBenchmark(name.c_str(),
                               [=](benchmark::State& state) { shrink(state, kernel); })
      ->ArgNames({"rows", "ranks"})
      ->ArgsProduct({{1, 6, 64}, {16, 128}});
}

int register_all() {
  std::vector<const void*> seen;
  const auto is_new = [&](const void* kernel) {
    if (std::find(seen.begin(), seen.end(), kernel) != seen.end()) return false;
    seen.push_back(kernel);
    return true;
  };
  for (const KernelTable& table : all_tables()) {
    for (const FormatTraits& traits : kFormatTraits) {
      const GemmChoice& gemm = table.gemm(traits.format);
      for (const GemmKernel* kernel : {gemm.few, gemm.many}) {
        if (is_new(kernel)) add_gemm(traits.gemm_family, kernel, traits.format);
      }
    }
    for (const ShrinkKernel* kernel : {table.lora_shrink, table.lora_shrink_tiles}) {
      if (kernel != nullptr && is_new(kernel)) add_shrink(kernel);
    }
    if (is_new(table.elementwise)) add_elementwise(table.elementwise);
  }
  return 0;
}

[[maybe_unused]] const int registered = register_all();

}  // namespace
}  // namespace ktrt
