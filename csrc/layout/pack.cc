#include "layout/pack.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

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
  const int tiles = layout.padded_k() / layout.params().tile_k;
  for (int tile = 0; tile < tiles; ++tile) {
    std::size_t packed = layout.tile_offset(strip, tile * layout.params().tile_k);
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

struct QuantizedRow {
  float scale = 0.0f;
  std::int32_t sum = 0;  // of what the kernels multiply: the codes, for INT4 those times 16
};

// kt_kernel is built with fast math, which turns the divisions by 127 and by 112 (a double, there)
// into products.
float scale_of(float amax, WeightFormat format) {
  if (format == WeightFormat::kInt8) return amax * (1.0f / 127.0f);
  return static_cast<float>(static_cast<double>(amax) * (1.0 / 112.0));
}

// The multiple of 16 nearest to an INT8 code in [-112, 112], halves away from zero.
std::int8_t round_to_16(std::int8_t code) {
  const int magnitude = (std::abs(code) + 8) & 0xf0;
  return static_cast<std::int8_t>(code < 0 ? -magnitude : magnitude);
}

// INT8 codes of a row; for INT4 multiples of 16. `amax` is finite.
QuantizedRow quantize_weight_row(const bf16_t* row, int count, float amax, WeightFormat format,
                                 std::int8_t* codes) {
  QuantizedRow result;
  const float scale = scale_of(amax, format);
  const float inverse = 1.0f / scale;
  // A row of zeros, or of values so small that 1/scale overflows, has scale 0 and codes 0.
  if (!std::isfinite(inverse)) return result;
  // Adding 1.5 · 2^23 rounds half to even and leaves the integer in the low mantissa bits.
  constexpr float kRound = 12582912.0f;
  for (int k = 0; k < count; ++k) {
    const float rounded = bf16_to_f32(row[k]) * inverse + kRound;
    auto code = static_cast<std::int8_t>(std::bit_cast<std::int32_t>(rounded) -
                                         std::bit_cast<std::int32_t>(kRound));
    if (format == WeightFormat::kInt4) code = round_to_16(code);
    codes[k] = code;
    result.sum += code;
  }
  result.scale = scale;
  return result;
}

constexpr int kNibbleColumns = 64;  // of a tile: this many in the low nibbles, then as many high

// Multiples of 16 to nibbles, both [padded_k] of one row.
void join_nibbles(const std::int8_t* codes, int padded_k, std::uint8_t* row) {
  for (int tile = 0; tile < padded_k; tile += 2 * kNibbleColumns) {
    for (int k = 0; k < kNibbleColumns; ++k) {
      const auto low = static_cast<std::uint8_t>(codes[tile + k]);
      const auto high = static_cast<std::uint8_t>(codes[tile + kNibbleColumns + k]);
      row[tile / 2 + k] = static_cast<std::uint8_t>((low >> 4) | (high & 0xf0));
    }
  }
}

// A row of INT8 codes as the layout keeps it before tiles are cut.
void store_codes(const std::int8_t* codes, const PackedLayout& layout, std::uint8_t* row) {
  if (layout.format() == WeightFormat::kInt4) {
    join_nibbles(codes, layout.padded_k(), row);
  } else {
    std::memcpy(row, codes, static_cast<std::size_t>(layout.padded_k()));
  }
}

// What the kernels multiply with, and the scale is for: 16 · code.
std::int8_t sixteen_codes_at(const std::uint8_t* row, int k) {
  const int column = k % (2 * kNibbleColumns);
  const std::uint8_t both = row[(k - column) / 2 + column % kNibbleColumns];
  return static_cast<std::int8_t>(column < kNibbleColumns ? both << 4 : both & 0xf0);
}

float value_at(const std::uint8_t* row, int k, WeightFormat format, float scale) {
  switch (format) {
    case WeightFormat::kBf16: {
      bf16_t value;
      std::memcpy(&value, row + static_cast<std::size_t>(k) * 2, 2);
      return bf16_to_f32(value);
    }
    case WeightFormat::kInt8:
      return scale * static_cast<float>(static_cast<std::int8_t>(row[k]));
    case WeightFormat::kInt4:
      return scale * static_cast<float>(sixteen_codes_at(row, k));
  }
  return 0.0f;
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
  const PackedLayout& layout = packed.layout;
  const WeightFormat format = layout.format();
  const std::size_t stride = row_stride(layout);
  std::vector<std::uint8_t> rows(kStripRows * stride, 0);
  std::vector<bf16_t> converted(static_cast<std::size_t>(layout.k()));
  std::vector<std::int8_t> codes(static_cast<std::size_t>(layout.padded_k()), 0);
  bool finite = true;
  for (int r = 0; r < kStripRows; ++r) {
    const int n = strip * kStripRows + r;
    std::uint8_t* row = rows.data() + static_cast<std::size_t>(r) * stride;
    QuantizedRow quantized;
    if (n < layout.n()) {
      row_to_bf16(w.row(n), w.dtype, layout.k(), converted.data());
      const bf16_t amax = largest_magnitude(converted.data(), layout.k());
      finite = finite && amax < kInfinity;
      if (format == WeightFormat::kBf16) {
        std::memcpy(row, converted.data(), converted.size() * sizeof(bf16_t));
      } else if (finite) {
        quantized = quantize_weight_row(converted.data(), layout.k(), bf16_to_f32(amax), format,
                                        codes.data());
        if (quantized.scale > 0.0f) store_codes(codes.data(), layout, row);
      }
    }
    if (is_quantized(format)) {
      packed.scales[n] = quantized.scale;
      packed.sums[n] = quantized.sum;
    }
  }
  for_each_word(layout, strip, [&](std::size_t to, std::size_t from) {
    std::memcpy(packed.codes + to, rows.data() + from, 4);
  });
  return finite;
}

void unpack(const PackedMatrix& packed, float* out) {
  const PackedLayout& layout = packed.layout;
  const WeightFormat format = layout.format();
  const std::size_t stride = row_stride(layout);
  std::vector<std::uint8_t> rows(kStripRows * stride);
  for (int strip = 0; strip < layout.strips(); ++strip) {
    for_each_word(layout, strip, [&](std::size_t from, std::size_t to) {
      std::memcpy(rows.data() + to, packed.codes + from, 4);
    });
    for (int r = 0; r < kStripRows && strip * kStripRows + r < layout.n(); ++r) {
      const int n = strip * kStripRows + r;
      const std::uint8_t* row = rows.data() + static_cast<std::size_t>(r) * stride;
      const float scale = is_quantized(format) ? packed.scales[n] : 1.0f;
      float* values = out + static_cast<std::size_t>(n) * static_cast<std::size_t>(layout.k());
      for (int k = 0; k < layout.k(); ++k) values[k] = value_at(row, k, format, scale);
    }
  }
}

}  // namespace ktrt
