#include "layout/coded.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "base/bf16.h"
#include "base/check.h"

namespace ktrt {

namespace {

constexpr float kE2m1[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
constexpr std::uint8_t kE4m3Nan = 0x7f;
constexpr std::uint8_t kE8m0Nan = 0xff;
constexpr std::uint8_t kE8m0One = 127;

// Byte of a half tile that holds a column of one of its 16 rows, and the bits below it.
struct Place {
  int byte;
  int shift;
};

Place place_of(int bits, int row, int column) {
  if (bits == 8) {
    const int in = column % 4;
    return {column / 4 * 64 + row / 4 * 16 + in / 2 * 8 + row % 4 * 2 + in % 2, 0};
  }
  const int in = column % 8;
  const int nibble = in / 2 + in % 2 * 4;
  return {column / 8 * 64 + row * 4 + nibble / 2, nibble % 2 * 4};
}

float e4m3_value(std::uint8_t code) {
  const int exponent = (code >> 3) & 15;
  const int mantissa = code & 7;
  float value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                              : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  if ((code & kE4m3Nan) == kE4m3Nan) value = std::numeric_limits<float>::quiet_NaN();
  return (code & 0x80) != 0 ? -value : value;
}

float scale_value(WeightFormat format, const std::byte* scales, std::int64_t index) {
  if (format == WeightFormat::kMxfp4) {
    const auto byte = std::to_integer<std::uint8_t>(scales[index]);
    return byte == kE8m0Nan ? std::numeric_limits<float>::quiet_NaN()
                            : std::ldexp(1.0f, byte - kE8m0One);
  }
  if (traits_of(format).scale == ScaleKind::kInTile) {
    bf16_t bits;
    std::memcpy(&bits, scales + index * 2, 2);
    return bf16_to_f32(bits);
  }
  float value;
  std::memcpy(&value, scales + index * 4, 4);
  return value;
}

int scale_size(WeightFormat format) {
  if (format == WeightFormat::kMxfp4) return 1;
  return traits_of(format).scale == ScaleKind::kInTile ? 2 : 4;
}

int divided(int value, int by) { return (value + by - 1) / by; }

// Writes to one strip of a packed matrix.
class StripWriter {
 public:
  StripWriter(const PackedMatrix& packed, int strip) : packed_(packed), strip_(strip) {
    const PackedLayout& layout = packed.layout;
    std::uint8_t* const first = packed.codes + layout.tile_offset(strip, 0);
    std::memset(first, 0, layout.tile_bytes() * static_cast<std::size_t>(layout.tiles()));
    if (packed.scales != nullptr) {
      std::fill_n(packed.scales + std::int64_t{strip} * layout.strip_scales(),
                  layout.strip_scales(), 0.0f);
    }
    if (layout.format() != WeightFormat::kMxfp4) return;
    for (int t = 0; t < layout.tiles(); ++t) {
      std::uint8_t* const tile = first + static_cast<std::size_t>(t) * layout.tile_bytes();
      std::memset(tile + kTileBytes, kE8m0One, layout.tile_bytes() - kTileBytes);
    }
  }

  void code(int row, int column, std::uint8_t code) {
    const FormatTraits& traits = packed_.layout.traits();
    const Place place = place_of(traits.bits, row % kHalfRows, column % traits.tile_k);
    std::uint8_t& byte = tile(column)[row / kHalfRows * (kTileBytes / 2) + place.byte];
    byte = static_cast<std::uint8_t>(byte | (code << place.shift));
  }
  // `bits`: the scale as the format keeps it.
  void group_scale(int row, int group, const void* bits) {
    const FormatTraits& traits = packed_.layout.traits();
    const int column = group * traits.group;
    const int size = scale_size(traits.format);
    const int in_tile = column % traits.tile_k / traits.group;
    std::memcpy(tile(column) + kTileBytes + (in_tile * kStripRows + row) * size, bits,
                static_cast<std::size_t>(size));
  }
  float& outer_scale(int index) {
    return packed_.scales[std::int64_t{strip_} * packed_.layout.strip_scales() + index];
  }

 private:
  std::uint8_t* tile(int column) {
    const int tile_k = packed_.layout.traits().tile_k;
    return packed_.codes + packed_.layout.tile_offset(strip_, column / tile_k * tile_k);
  }

  const PackedMatrix& packed_;
  const int strip_;
};

std::uint8_t source_code(const std::uint8_t* row, int bits, int column) {
  if (bits == 8) return row[column];
  return static_cast<std::uint8_t>(column % 2 == 0 ? row[column / 2] & 15 : row[column / 2] >> 4);
}

// The nearest code, halves to the even one; the largest for what is larger.
std::uint8_t nearest_code(WeightFormat format, float value) {
  if (format == WeightFormat::kFp8 || format == WeightFormat::kFp8Channel) {
    constexpr float kLargest = 448.0f;
    const float magnitude = std::min(std::fabs(value), kLargest);
    const int exponent = std::max(magnitude > 0.0f ? std::ilogb(magnitude) : -6, -6);
    const auto steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 3 - exponent)));
    // 8 steps and more carry into the exponent by themselves.
    const int code = (exponent + 6) * 8 + steps;
    return static_cast<std::uint8_t>(code | (std::signbit(value) ? 0x80 : 0));
  }
  if (format != WeightFormat::kMxfp4) {
    const auto code = static_cast<int>(std::nearbyint(std::clamp(value, -8.0f, 7.0f)));
    return static_cast<std::uint8_t>(code & 15);
  }
  const float magnitude = std::fabs(value);
  int code = 0;
  for (int next = 1; next < 8; ++next) {
    const float middle = (kE2m1[next - 1] + kE2m1[next]) / 2.0f;
    if (magnitude > middle || (magnitude == middle && next % 2 == 0)) code = next;
  }
  return static_cast<std::uint8_t>(code | (std::signbit(value) && code != 0 ? 8 : 0));
}

double squared_error(WeightFormat format, const float* weights, int count, float scale) {
  double sum = 0.0;
  for (int i = 0; i < count; ++i) {
    const float back = scale * coded_value(format, nearest_code(format, weights[i] / scale));
    sum += double{weights[i] - back} * (weights[i] - back);
  }
  return sum;
}

// The best scale of a group's weights, in the format's precision; 0 for zeros.
float group_scale(WeightFormat format, const float* weights, int count) {
  float largest = 0.0f;
  for (int i = 0; i < count; ++i) largest = std::max(largest, std::fabs(weights[i]));
  if (largest == 0.0f) return 0.0f;
  if (!traits_of(format).group || traits_of(format).scale == ScaleKind::kPerBlock) {
    const float scale = largest / 448.0f;
    return std::isfinite(1.0f / scale) ? scale : 0.0f;
  }
  if (format == WeightFormat::kMxfp4) {
    return std::ldexp(1.0f, std::clamp(std::ilogb(largest) - 2, -126, 127));
  }
  // Around the scales that give the largest weight the code 7, or -8 with a negative scale.
  constexpr int kCandidates = 16;
  float best = 0.0f;
  double least = std::numeric_limits<double>::infinity();
  for (int i = 0; i <= kCandidates; ++i) {
    const float divisor = 6.4f + 1.8f * static_cast<float>(i) / kCandidates;
    for (const float sign : {1.0f, -1.0f}) {
      const float scale = bf16_to_f32(f32_to_bf16(sign * largest / divisor));
      if (!std::isfinite(1.0f / scale)) continue;
      const double error = squared_error(format, weights, count, scale);
      if (error < least) {
        least = error;
        best = scale;
      }
    }
  }
  return best;
}

// Rows of a strip as floats, zeros after n and k.
struct StripValues {
  std::vector<float> values;  // [32][columns]
  int columns;
  bool finite = true;

  StripValues(const TensorView& w, const PackedLayout& layout, int strip)
      : values(static_cast<std::size_t>(kStripRows) * static_cast<std::size_t>(layout.padded_k())),
        columns(layout.padded_k()) {
    std::vector<bf16_t> weights(static_cast<std::size_t>(layout.k()));
    for (int r = 0; r < kStripRows && strip * kStripRows + r < layout.n(); ++r) {
      row_to_bf16(w.row(strip * kStripRows + r), w.dtype, layout.k(), weights.data());
      for (int k = 0; k < layout.k(); ++k) {
        row(r)[k] = bf16_to_f32(weights[static_cast<std::size_t>(k)]);
        finite = finite && std::isfinite(row(r)[k]);
      }
    }
  }
  float* row(int r) { return values.data() + std::int64_t{r} * columns; }
};

// Codes of `count` columns of a row, all of one scale.
void write_codes(StripWriter& writer, WeightFormat format, int row, int first, int count,
                 const float* weights, float scale) {
  if (scale == 0.0f) return;
  for (int i = 0; i < count; ++i) {
    writer.code(row, first + i, nearest_code(format, weights[i] / scale));
  }
}

void encode_blocks(StripWriter& writer, StripValues& strip, int k) {
  for (int first = 0; first < k; first += kBlockColumns) {
    const int count = std::min(kBlockColumns, k - first);
    float largest = 0.0f;
    for (int r = 0; r < kStripRows; ++r) {
      for (int i = 0; i < count; ++i) {
        largest = std::max(largest, std::fabs(strip.row(r)[first + i]));
      }
    }
    const float scale = group_scale(WeightFormat::kFp8, &largest, 1);
    writer.outer_scale(first / kBlockColumns) = scale;
    for (int r = 0; r < kStripRows; ++r) {
      write_codes(writer, WeightFormat::kFp8, r, first, count, strip.row(r) + first, scale);
    }
  }
}

void encode_groups(StripWriter& writer, StripValues& strip, WeightFormat format, int row, int k) {
  const int group = traits_of(format).group;
  for (int first = 0; first < k; first += group) {
    const int count = std::min(group, k - first);
    const float scale = group_scale(format, strip.row(row) + first, count);
    write_codes(writer, format, row, first, count, strip.row(row) + first, scale);
    const bf16_t bits = f32_to_bf16(scale);
    const auto exponent =
        static_cast<std::uint8_t>(scale == 0.0f ? kE8m0One : std::ilogb(scale) + kE8m0One);
    writer.group_scale(row, first / group,
                       format == WeightFormat::kMxfp4 ? static_cast<const void*>(&exponent)
                                                      : static_cast<const void*>(&bits));
  }
}

}  // namespace

float coded_value(WeightFormat format, std::uint8_t code) {
  if (format == WeightFormat::kFp8 || format == WeightFormat::kFp8Channel) return e4m3_value(code);
  if (format == WeightFormat::kMxfp4) {
    return (code & 8) != 0 ? -kE2m1[code & 7] : kE2m1[code & 7];
  }
  return static_cast<float>((code & 15) < 8 ? code & 15 : (code & 15) - 16);
}

void check_coded(const CodedSource& source, WeightFormat format, int n, int k) {
  const FormatTraits& traits = traits_of(format);
  KTRT_CHECK(is_coded(format),
             "the layer's format is " << traits.name << ", which no checkpoint ships as codes");
  const auto expect_dtype = [](const TensorView& view, DType dtype) {
    KTRT_CHECK(view.dtype == dtype,
               view.name << " is " << name_of(view.dtype) << ", expected " << name_of(dtype));
  };
  expect_dtype(source.codes, DType::kUint8);
  source.codes.expect_shape({n, divided(k * traits.bits, 8)});
  switch (traits.scale) {
    case ScaleKind::kPerBlock:
      expect_dtype(source.scales, DType::kFloat32);
      return source.scales.expect_shape({divided(n, kStripRows), divided(k, kBlockColumns)});
    case ScaleKind::kPerChannel:
      expect_dtype(source.scales, DType::kFloat32);
      return source.scales.expect_shape({n});
    default:
      expect_dtype(source.scales,
                   format == WeightFormat::kMxfp4 ? DType::kUint8 : DType::kBfloat16);
      return source.scales.expect_shape({n, divided(k, traits.group)});
  }
}

bool pack_coded_strip(const CodedSource& source, int row, const PackedMatrix& packed, int strip) {
  const PackedLayout& layout = packed.layout;
  const FormatTraits& traits = layout.traits();
  const int k = layout.k();
  StripWriter writer(packed, strip);
  bool finite = true;
  const auto scale_of = [&](const std::byte* scales, std::int64_t index) {
    const float scale = scale_value(traits.format, scales, index);
    finite = finite && std::isfinite(scale);
    return scale;
  };
  const int first = row + strip * kStripRows;
  if (traits.scale == ScaleKind::kPerBlock) {
    const std::byte* scales = source.scales.row(first / kStripRows);
    for (int i = 0; i < layout.strip_scales(); ++i) writer.outer_scale(i) = scale_of(scales, i);
  }
  for (int r = 0; r < kStripRows && strip * kStripRows + r < layout.n(); ++r) {
    const auto* codes = reinterpret_cast<const std::uint8_t*>(source.codes.row(first + r));
    for (int column = 0; column < k; ++column) {
      const std::uint8_t code = source_code(codes, traits.bits, column);
      finite = finite && (traits.bits != 8 || (code & kE4m3Nan) != kE4m3Nan);
      writer.code(r, column, code);
    }
    if (traits.scale == ScaleKind::kPerChannel) {
      writer.outer_scale(r) = scale_of(source.scales.row(first + r), 0);
    } else if (traits.scale == ScaleKind::kInTile) {
      const std::byte* scales = source.scales.row(first + r);
      for (int group = 0; group < divided(k, traits.group); ++group) {
        scale_of(scales, group);
        writer.group_scale(r, group, scales + std::int64_t{group} * scale_size(traits.format));
      }
    }
  }
  return finite;
}

bool encode_coded_strip(const TensorView& w, const PackedMatrix& packed, int strip) {
  const PackedLayout& layout = packed.layout;
  const WeightFormat format = layout.format();
  StripValues values(w, layout, strip);
  StripWriter writer(packed, strip);
  if (!values.finite) return false;
  if (layout.traits().scale == ScaleKind::kPerBlock) {
    encode_blocks(writer, values, layout.k());
    return true;
  }
  for (int r = 0; r < kStripRows && strip * kStripRows + r < layout.n(); ++r) {
    if (layout.traits().scale == ScaleKind::kInTile) {
      encode_groups(writer, values, format, r, layout.k());
      continue;
    }
    const float scale = group_scale(format, values.row(r), layout.k());
    writer.outer_scale(r) = scale;
    write_codes(writer, format, r, 0, layout.k(), values.row(r), scale);
  }
  return true;
}

void decode_coded_strip(const PackedMatrix& packed, int strip, float* out, std::int64_t stride) {
  const PackedLayout& layout = packed.layout;
  const FormatTraits& traits = layout.traits();
  const float* outer = packed.scales == nullptr
                           ? nullptr
                           : packed.scales + std::int64_t{strip} * layout.strip_scales();
  for (int r = 0; r < kStripRows && strip * kStripRows + r < layout.n(); ++r) {
    for (int k = 0; k < layout.k(); ++k) {
      const int in_tile = k % traits.tile_k;
      const std::uint8_t* tile = packed.codes + layout.tile_offset(strip, k - in_tile);
      const Place place = place_of(traits.bits, r % kHalfRows, in_tile);
      const int code = tile[r / kHalfRows * (kTileBytes / 2) + place.byte] >> place.shift;
      float scale = 0.0f;
      if (traits.scale == ScaleKind::kInTile) {
        const auto* scales = reinterpret_cast<const std::byte*>(tile + kTileBytes);
        scale = scale_value(traits.format, scales, in_tile / traits.group * kStripRows + r);
      } else {
        scale = outer[traits.scale == ScaleKind::kPerBlock ? k / kBlockColumns : r];
      }
      out[r * stride + k] = scale * coded_value(traits.format, static_cast<std::uint8_t>(code));
    }
  }
}

}  // namespace ktrt
