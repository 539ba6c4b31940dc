#include "layout/coded.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/bf16.h"
#include "base/check.h"
#include "layout/coded_writer.h"

namespace ktrt {

namespace {

constexpr float kE2m1[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};

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

// The largest magnitude of any code.
float largest_value(WeightFormat format) {
  return traits_of(format).bits == 8 ? 448.0f : format == WeightFormat::kMxfp4 ? 6.0f : 8.0f;
}

int divided(int value, int by) { return (value + by - 1) / by; }

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
  const float largest = largest_value(traits.format);
  bool finite = true;
  const auto scale_of = [&](const std::byte* scales, std::int64_t index) {
    const float scale = scale_value(traits.format, scales, index);
    finite = finite && std::isfinite(scale * largest);
    return scale;
  };
  const int first = row + strip * kStripRows;
  if (traits.scale == ScaleKind::kPerBlock) {
    const std::byte* scales = source.scales.row(first / kStripRows);
    for (int i = 0; i < layout.strip_scales(); ++i) writer.outer_scale(i) = scale_of(scales, i);
  }
  for (int r = 0; r < kStripRows && strip * kStripRows + r < layout.n(); ++r) {
    const auto* codes = reinterpret_cast<const std::uint8_t*>(source.codes.row(first + r));
    finite = writer.row(r, codes, k) && finite;
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
