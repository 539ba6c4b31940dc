// GEMM of coded formats on AMX tiles: the codes of a k-block become BF16 tiles in the L1 cache,
// with which the BF16 GEMM goes on.
//
// The first rows' multiplications unpack it, a tile ahead. Unpacking takes 60 (E2M1) to 140 cycles
// a tile (INT4), two tiles of rows multiply for 64: INT4's unpacking would only be in the way, so
// its blocks are unpacked as a whole, before. Spread over all rows' multiplications of the block
// before, which then had half the tiles, layers took 5 to 12 % longer.
#pragma once

#include "kernels/amx/scaled_sums.h"
#include "kernels/gemm_bf16/amx_body.h"
#include "kernels/gemm_bf16/amx_one_row.h"
#include "kernels/gemm_coded/amx_unpack.h"

namespace ktrt {
namespace {

constexpr int kTileColumns = 32;  // of a BF16 tile

template <class Format>
constexpr int kUnpackedAhead = Format::kCode == Code::kInt4 ? kMaxBlockTiles : 1;

template <class Format>
class UnpackedTiles : public MadeTiles<UnpackedTiles<Format>, kUnpackedAhead<Format>> {
 public:
  explicit UnpackedTiles(const GemmArgs& g) : g_(g), packed_(coded_tiles<Format>(g)) {
    if constexpr (Format::kGroup == 0) unpack_.set_scale(1.0f);
  }

  void make(int tile, uint8_t* out) {
    unpack_half(tile, 0, out);
    unpack_half(tile, 1, out + kTileHalf);
  }

 private:
  static constexpr int kInPacked = Format::kTileColumns / kTileColumns;  // BF16 tiles
  static constexpr int kHalves = 2 * kInPacked;
  static constexpr int kAhead = 4;  // packed tiles, for prefetching

  void unpack_half(int tile, int half, uint8_t* out) {
    const uint8_t* packed = coded_tile<Format>(g_, tile / kInPacked);
    const int in_packed = tile % kInPacked;
    const uint8_t* codes = packed + half * kTileHalf + in_packed * (kTileHalf / kInPacked);
    prefetch_ahead(tile / kInPacked, in_packed * 2 + half);
    if constexpr (Format::kCode == Code::kE4m3) {
      constexpr int kInGroup = Format::kGroup / kTileColumns;
      if constexpr (Format::kGroup != 0) {
        if (tile % kInGroup == 0 && half == 0) unpack_.set_scale(g_.w_scale[tile / kInGroup]);
      }
      unpack_.half(codes, out);
    } else {
      Unpack unpack;  // in registers
      unpack.set_scales(group_scales<Format>(packed, in_packed * kTileColumns / Format::kGroup) +
                        half * Format::kScaleBytes * 16);
      unpack.half(codes, out);
    }
  }

  // As large a part of the tile that is kAhead tiles ahead, of this strip or the next one.
  void prefetch_ahead(int packed, int share) {
    const int index = packed + kAhead;
    const uint8_t* ahead = coded_tile<Format>(g_, index);
    if (index >= packed_) {
      if (g_.next == nullptr) return;
      ahead = g_.next + static_cast<int64_t>(index - packed_) * Format::kTileBytes;
    }
    constexpr int kLines = (Format::kTileBytes + 63) / 64;
    for (int i = share * kLines / kHalves; i < (share + 1) * kLines / kHalves; ++i) {
      __builtin_prefetch(ahead + i * 64, 0, 2);
    }
  }

  using Unpack = typename UnpackOf<Format::kCode>::Type;

  const GemmArgs& g_;
  const int packed_;  // tiles of the strip
  Unpack unpack_;
};

// The scale in the weights.
template <WeightFormat kFormat>
class AmxCodedGemm : public AmxBf16Gemm {
 public:
  using WeightTiles = UnpackedTiles<Coded<kFormat>>;
  using AmxBf16Gemm::AmxBf16Gemm;
};

// One scale per output: exact codes in the tiles, and their sums are scaled.
class OutputScale {
 public:
  OutputScale(const GemmArgs& g, int) : g_(g) {}
  __m512 apply(const float* sums, int half) const {
    return _mm512_mul_ps(_mm512_loadu_ps(g_.w_scale + half), _mm512_loadu_ps(sums));
  }

 private:
  const GemmArgs& g_;
};
template <>
class AmxCodedGemm<WeightFormat::kFp8Channel> : public ScaledSums<OutputScale> {
 public:
  static constexpr int kLayoutBlock = AmxBf16Gemm::kLayoutBlock;
  using WeightTiles = UnpackedTiles<Coded<WeightFormat::kFp8Channel>>;
  using Multiply = MultiplyBf16;
  static int row_bytes(const GemmArgs& g) { return g.k * 2; }
  using ScaledSums::ScaledSums;
};

// Tables by coded_index().
template <class Tiles, WeightFormat kFormat>
void coded_strip(const GemmArgs& g) {
  tile_strip<Tiles, AmxCodedGemm<kFormat>>(g);
}
template <class Tiles, WeightFormat kFormat>
constexpr GemmKernel coded_kernel(const char* name, const GemmKernel* fixed) {
  return {name, coded_strip<Tiles, kFormat>, expand_rows<Bf16Expand>, 0, true, nullptr, 0, fixed};
}
// The same bits for LoRA off the tiles.
template <class Tiles, WeightFormat kFormat>
constexpr GemmKernel fixed_coded_kernel(const char* name) {
  if (kFormat == WeightFormat::kFp8Channel) {
    return {name, tile_strip_then_expand<Tiles, AmxCodedGemm<kFormat>>, expand_rows<Bf16Expand>, 0,
            true};
  }
  return {name, coded_strip<Tiles, kFormat>, tile_ordered_expand_rows, 0, true};
}

}  // namespace
}  // namespace ktrt
