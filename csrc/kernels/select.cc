#include "kernels/select.h"

#include <array>

#include "kernels/bf16_arithmetic.h"
#include "layout/format_traits.h"

namespace ktrt {

// One constant table per ISA file.
extern const GemmKernel gemm_bf16_portable;
extern const GemmKernel gemm_bf16_avx2;
extern const GemmKernel gemm_bf16_avx512;
extern const GemmKernel gemm_bf16_avx512_bf16;
extern const GemmKernel gemm_bf16_amx;
extern const GemmKernel gemm_bf16_amx_emulated;
extern const GemmKernel gemm_int8_portable;
extern const GemmKernel gemm_int8_avx2;
extern const GemmKernel gemm_int8_avx_vnni;
extern const GemmKernel gemm_int8_avx_vnni_evex;
extern const GemmKernel gemm_int8_avx512_vnni;
extern const GemmKernel gemm_int8_avx512_bf16;
extern const GemmKernel gemm_int8_amx;
extern const GemmKernel gemm_int8_amx_emulated;
extern const GemmKernel gemm_int4_portable;
extern const GemmKernel gemm_int4_avx2;
extern const GemmKernel gemm_int4_avx_vnni;
extern const GemmKernel gemm_int4_avx_vnni_evex;
extern const GemmKernel gemm_int4_avx512_vnni;
extern const GemmKernel gemm_int4_avx512_bf16;
extern const GemmKernel gemm_int4_amx;
extern const GemmKernel gemm_int4_amx_emulated;
// By coded_index().
extern const GemmKernel gemm_coded_portable[kNumCodedFormats];
extern const GemmKernel gemm_coded_avx2[kNumCodedFormats];
extern const GemmKernel gemm_coded_avx512[kNumCodedFormats];
extern const GemmKernel gemm_coded_avx512_bf16[kNumCodedFormats];
extern const GemmKernel gemm_coded_amx[kNumCodedFormats];
extern const GemmKernel gemm_coded_amx_emulated[kNumCodedFormats];
extern const ShrinkKernel lora_shrink_portable;
extern const ShrinkKernel lora_shrink_avx2;
extern const ShrinkKernel lora_shrink_avx512_bf16;
extern const ShrinkKernel lora_shrink_amx;
extern const ShrinkKernel lora_shrink_amx_emulated;
extern const ElementwiseKernels elementwise_portable;
extern const ElementwiseKernels elementwise_avx2;
extern const ElementwiseKernels elementwise_avx512;
extern const DenseKernel dense_bf16_portable;
extern const DenseKernel dense_bf16_avx2;
extern const DenseKernel dense_bf16_avx512;
extern const DenseKernel dense_bf16_avx512_bf16;
extern const GemmKernel dense_tiles_amx;
extern const GemmKernel dense_tiles_amx_emulated;
extern const DenseF32Kernel dense_f32_portable;
extern const DenseF32Kernel dense_f32_avx2;
extern const DenseF32Kernel dense_f32_avx512;
extern const AttentionKernel attention_portable;
extern const AttentionKernel attention_avx2;
extern const AttentionKernel attention_avx512;
extern const AttentionScores attention_bf16_scores_avx512;
extern const LinearAttentionKernel linear_attention_portable;
extern const PromptAttentionKernel prompt_attention_avx512_bf16;
extern const LinearAttentionKernel linear_attention_avx2;
extern const LinearAttentionKernel linear_attention_avx512;

namespace {

// An ISA's file exports one constant; all but the scores is the same.
const AttentionKernel& attention_with_bf16_scores() {
  static const AttentionKernel kernel = [] {
    AttentionKernel changed = attention_avx512;
    changed.name = "avx512_bf16";
    changed.bf16_scores = attention_bf16_scores_avx512;
    return changed;
  }();
  return kernel;
}

template <class Kernel>
struct Variant {
  const Kernel* kernel;
  Isa level;
  bool runs;  // the processor has the features that the variant needs
};

// Variants go from best to worst; the last one always runs.
template <class Kernel, std::size_t count>
const Kernel* first_that_runs(const std::array<Variant<Kernel>, count>& variants, Isa level) {
  for (const Variant<Kernel>& variant : variants) {
    if (variant.runs && variant.level <= level) return variant.kernel;
  }
  return variants.back().kernel;
}

// Rows of one expert from which tiles beat AVX-512, measured on a 16-core Emerald Rapids machine
// with weights in the L2 cache: BF16 122 against 62 GFLOP/s at 2 rows, INT8 410 against 320 GOP/s
// at 4.
constexpr int kBf16TilesFrom = 2;
constexpr int kInt8TilesFrom = 4;
// Tiles of INT4 and of coded formats have to be unpacked first, whatever the number of rows. From
// L2
// (`bench_amx few`, same machine) INT4's win from 11 rows on, coded ones from 2 (FP8, MXFP4) or 4.
// In a layer, whose weights come from memory, AVX-512 reads few rows 5 to 8 % faster, and coded
// INT4 is level at 6 rows (bench/formats.py, 16 and 64 tokens). By coded_index().
constexpr int kInt4TilesFrom = 11;
constexpr int kCodedTilesFrom[kNumCodedFormats] = {4, 4, 8, 8, 8, 4};
// Rows of a dense BF16 linear from which tiles beat AVX-512, same machine, 2 and 16 threads,
// weights from memory: level at 8 rows, 1.6 to 2.3 times as fast at 16, 5 to 8 times at 1,024.
constexpr int kDenseTilesFrom = 8;

GemmChoice choose(const GemmKernel* few, const GemmKernel* tiles, int tiles_from) {
  return tiles == nullptr ? GemmChoice{few, few, 0} : GemmChoice{few, tiles, tiles_from};
}

}  // namespace

KernelTable select_kernels(Isa level, const CpuFeatures& f, Bf16Arithmetic bf16) {
  const bool amx = f.amx && level == Isa::kAmx;
  const bool dots = f.avx512_bf16 && bf16 == Bf16Arithmetic::kDot;
  const bool gemm_dots = dots || (amx && f.avx512_bf16);
  const std::array<Variant<GemmKernel>, 4> gemm_bf16 = {{
      {&gemm_bf16_avx512_bf16, Isa::kAvx512, gemm_dots},
      {&gemm_bf16_avx512, Isa::kAvx512, f.avx512},
      {&gemm_bf16_avx2, Isa::kAvx2, f.avx2},
      {&gemm_bf16_portable, Isa::kPortable, true},
  }};
  const std::array<Variant<GemmKernel>, 6> gemm_int8 = {{
      {&gemm_int8_avx512_bf16, Isa::kAvx512, f.avx512_vnni && f.avx512_bf16},
      {&gemm_int8_avx512_vnni, Isa::kAvx512, f.avx512_vnni},
      {&gemm_int8_avx_vnni, Isa::kAvxVnni, f.avx_vnni},
      {&gemm_int8_avx_vnni_evex, Isa::kAvxVnni, f.avx512_vnni},
      {&gemm_int8_avx2, Isa::kAvx2, f.avx2},
      {&gemm_int8_portable, Isa::kPortable, true},
  }};
  const std::array<Variant<GemmKernel>, 6> gemm_int4 = {{
      {&gemm_int4_avx512_bf16, Isa::kAvx512, f.avx512_vnni && f.avx512_bf16},
      {&gemm_int4_avx512_vnni, Isa::kAvx512, f.avx512_vnni},
      {&gemm_int4_avx_vnni, Isa::kAvxVnni, f.avx_vnni},
      {&gemm_int4_avx_vnni_evex, Isa::kAvxVnni, f.avx512_vnni},
      {&gemm_int4_avx2, Isa::kAvx2, f.avx2},
      {&gemm_int4_portable, Isa::kPortable, true},
  }};
  const std::array<Variant<GemmKernel>, 4> gemm_coded = {{
      {gemm_coded_avx512_bf16, Isa::kAvx512, gemm_dots},
      {gemm_coded_avx512, Isa::kAvx512, f.avx512},
      {gemm_coded_avx2, Isa::kAvx2, f.avx2},
      {gemm_coded_portable, Isa::kPortable, true},
  }};
  const std::array<Variant<ShrinkKernel>, 3> lora_shrink = {{
      {&lora_shrink_avx512_bf16, Isa::kAvx512, f.avx512_bf16},
      {&lora_shrink_avx2, Isa::kAvx2, f.avx2},
      {&lora_shrink_portable, Isa::kPortable, true},
  }};
  const std::array<Variant<ElementwiseKernels>, 3> elementwise = {{
      {&elementwise_avx512, Isa::kAvx512, f.avx512},
      {&elementwise_avx2, Isa::kAvx2, f.avx2},
      {&elementwise_portable, Isa::kPortable, true},
  }};
  const std::array<Variant<DenseKernel>, 4> dense_bf16 = {{
      {&dense_bf16_avx512_bf16, Isa::kAvx512, dots},
      {&dense_bf16_avx512, Isa::kAvx512, f.avx512},
      {&dense_bf16_avx2, Isa::kAvx2, f.avx2},
      {&dense_bf16_portable, Isa::kPortable, true},
  }};
  const std::array<Variant<DenseF32Kernel>, 3> dense_f32 = {{
      {&dense_f32_avx512, Isa::kAvx512, f.avx512},
      {&dense_f32_avx2, Isa::kAvx2, f.avx2},
      {&dense_f32_portable, Isa::kPortable, true},
  }};
  const std::array<Variant<AttentionKernel>, 4> attention = {{
      {&attention_with_bf16_scores(), Isa::kAvx512, dots},
      {&attention_avx512, Isa::kAvx512, f.avx512},
      {&attention_avx2, Isa::kAvx2, f.avx2},
      {&attention_portable, Isa::kPortable, true},
  }};
  KernelTable table{};
  table.gemm(WeightFormat::kBf16) =
      choose(first_that_runs(gemm_bf16, level), amx ? &gemm_bf16_amx : nullptr, kBf16TilesFrom);
  table.gemm(WeightFormat::kInt8) =
      choose(first_that_runs(gemm_int8, level), amx ? &gemm_int8_amx : nullptr, kInt8TilesFrom);
  table.gemm(WeightFormat::kInt4) =
      choose(first_that_runs(gemm_int4, level), amx ? &gemm_int4_amx : nullptr, kInt4TilesFrom);
  for (const WeightFormat format : kWeightFormats) {
    if (!is_coded(format)) continue;
    const int index = coded_index(format);
    const GemmKernel* few = first_that_runs(gemm_coded, level) + index;
    table.gemm(format) =
        choose(few, amx ? &gemm_coded_amx[index] : nullptr, kCodedTilesFrom[index]);
  }
  table.lora_shrink = first_that_runs(lora_shrink, level);
  table.lora_shrink_tiles = amx ? &lora_shrink_amx : nullptr;
  table.elementwise = first_that_runs(elementwise, level);
  table.dense_bf16 = first_that_runs(dense_bf16, level);
  table.dense_tiles = amx ? &dense_tiles_amx : nullptr;
  table.dense_tiles_from = kDenseTilesFrom;
  table.dense_f32 = first_that_runs(dense_f32, level);
  table.attention = first_that_runs(attention, level);
  table.fixed = !amx;
  return table;
}

KernelTable active_kernels() {
  return select_kernels(active_isa(), cpu_features(), active_bf16_arithmetic());
}

const LinearAttentionKernel& select_linear_attention(Isa level, const CpuFeatures& f) {
  const std::array<Variant<LinearAttentionKernel>, 3> variants = {{
      {&linear_attention_avx512, Isa::kAvx512, f.avx512},
      {&linear_attention_avx2, Isa::kAvx2, f.avx2},
      {&linear_attention_portable, Isa::kPortable, true},
  }};
  return *first_that_runs(variants, level);
}

const PromptAttentionKernel* select_prompt_attention(Isa level, const CpuFeatures& f,
                                                     Bf16Arithmetic bf16) {
  const bool dots = level >= Isa::kAvx512 && f.avx512_bf16 && bf16 == Bf16Arithmetic::kDot;
  return dots ? &prompt_attention_avx512_bf16 : nullptr;
}

KernelTable fixed(KernelTable table) {
  table.fixed = true;
  table.dense_tiles_from = 1;
  if (table.lora_shrink_tiles == nullptr) return table;
  for (int i = 0; i < kNumWeightFormats; ++i) {
    GemmChoice& gemm = table.gemms[i];
    if (gemm.many->fixed != nullptr) gemm.many = gemm.many->fixed;
    if (!quantizes_rows(static_cast<WeightFormat>(i))) gemm = {gemm.many, gemm.many, 0};
  }
  // It reads rows in either order.
  table.lora_shrink = table.lora_shrink_tiles;
  return table;
}

const GemmKernel& emulated_amx_gemm(WeightFormat format) {
  if (is_coded(format)) return gemm_coded_amx_emulated[coded_index(format)];
  static constexpr const GemmKernel* kKernels[] = {&gemm_bf16_amx_emulated, &gemm_int8_amx_emulated,
                                                   &gemm_int4_amx_emulated};
  return *kKernels[static_cast<int>(format)];
}

const ShrinkKernel& emulated_amx_shrink() { return lora_shrink_amx_emulated; }
const GemmKernel& emulated_amx_dense() { return dense_tiles_amx_emulated; }

}  // namespace ktrt
