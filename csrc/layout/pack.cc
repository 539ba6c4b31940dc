#include "layout/pack.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "layout/coded.h"

namespace ktrt {

namespace {

constexpr std::size_t kWordsPerTileRow = kTileRowBytes / 4;

// Bytes between the rows of a strip's row-major codes: one cache line more than a row, whose bytes
// are often a multiple of 4096, so that the 16 rows of a half tile share no set of the L1 cache.
std::size_t row_stride(const PackedLayout& layout) {
  return static_cast<std::size_t>(layout.row_bytes()) + kTileRowBytes;
}

// Calls visit(byte offset in the packed codes, byte offset in the strip's row-major codes
// [32][row_stride]) for every 4-byte word of a strip: each half tile is the transpose of a 16 × 16
// block of words, whatever the element type.
template <class Visit>
void for_each_word(const PackedLayout& layout, int strip, Visit visit) {
  const std::size_t stride = row_stride(layout);
  const int tiles = layout.padded_k() / layout.traits().tile_k;
  for (int tile = 0; tile < tiles; ++tile) {
    std::size_t packed = layout.tile_offset(strip, tile * layout.traits().tile_k);
    const std::size_t column = static_cast<std::size_t>(tile) * kTileRowBytes;
    for (int half = 0; half < 2; ++half) {
      for (std::size_t group = 0; group < kWordsPerTileRow; ++group) {
        for (int row = 0; row < kHalfRows; ++row) {
          visit(packed,
                static_cast<std::size_t>(half * kHalfRows + row) * stride + column + group * 4);
          packed += 4;
        }
      }
    }
  }
}

constexpr bf16_t kMagnitude = 0x7fff;
constexpr bf16_t kInfinity = 0x7f80;

// The largest magnitude as a bit pattern; kInfinity or more if a value is not finite. Magnitudes of
// floats are ordered as their bits are, and integers vectorise on baseline x86-64.
bf16_t largest_magnitude(const bf16_t* row, int count) {
  std::int16_t largest = 0;
  for (int k = 0; k < count; ++k) {
    largest = std::max(largest, static_cast<std::int16_t>(row[k] & kMagnitude));
  }
  return static_cast<bf16_t>(largest);
}

}  // namespace

void row_to_bf16(const std::byte* row, DType dtype, int count, bf16_t* out) {
  if (dtype == DType::kBfloat16) {
    std::memcpy(out, row, static_cast<std::size_t>(count) * sizeof(bf16_t));
  } else if (dtype == DType::kFloat32) {
    const auto* values = reinterpret_cast<const float*>(row);
    for (int i = 0; i < count; ++i) out[i] = f32_to_bf16(values[i]);
  } else {
    const auto* values = reinterpret_cast<const fp16_t*>(row);
    for (int i = 0; i < count; ++i) out[i] = f32_to_bf16(fp16_to_f32(values[i]));
  }
}

bool pack_strip(const TensorView& w, const PackedMatrix& packed, int strip) {
  if (is_coded(packed.layout.format())) return encode_coded_strip(w, packed, strip);
  const PackedLayout& layout = packed.layout;
  const std::size_t stride = row_stride(layout);
  std::vector<std::uint8_t> rows(kStripRows * stride, 0);
  std::vector<bf16_t> weights(static_cast<std::size_t>(layout.k()));
  bool finite = true;
  for (int r = 0; r < kStripRows; ++r) {
    const int n = strip * kStripRows + r;
    EncodedRow row;
    if (n < layout.n()) {
      row_to_bf16(w.row(n), w.dtype, layout.k(), weights.data());
      const bf16_t largest = largest_magnitude(weights.data(), layout.k());
      finite = finite && largest < kInfinity;
      if (finite) {
        row = layout.traits().codec->encode(weights.data(), layout.k(), bf16_to_f32(largest),
                                            rows.data() + static_cast<std::size_t>(r) * stride);
      }
    }
    if (packed.scales != nullptr) {
      packed.scales[n] = row.scale;
      packed.sums[n] = row.sum;
    }
  }
  for_each_word(layout, strip, [&](std::size_t to, std::size_t from) {
    std::memcpy(packed.codes + to, rows.data() + from, 4);
  });
  return finite;
}

void unpack(const PackedMatrix& packed, float* out) {
  const PackedLayout& layout = packed.layout;
  const std::size_t stride = row_stride(layout);
  std::vector<std::uint8_t> rows(kStripRows * stride);
  for (int strip = 0; strip < layout.strips(); ++strip) {
    if (is_coded(layout.format())) {
      decode_coded_strip(packed, strip, out + std::int64_t{strip} * kStripRows * layout.k(),
                         layout.k());
      continue;
    }
    for_each_word(layout, strip, [&](std::size_t from, std::size_t to) {
      std::memcpy(rows.data() + to, packed.codes + from, 4);
    });
    for (int r = 0; r < kStripRows && strip * kStripRows + r < layout.n(); ++r) {
      const int n = strip * kStripRows + r;
      const float scale = packed.scales != nullptr ? packed.scales[n] : 1.0f;
      layout.traits().codec->decode(
          rows.data() + static_cast<std::size_t>(r) * stride, layout.k(), scale,
          out + static_cast<std::size_t>(n) * static_cast<std::size_t>(layout.k()));
    }
  }
}

}  // namespace ktrt
