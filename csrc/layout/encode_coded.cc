// Coded formats from floats.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "base/bf16.h"
#include "layout/coded.h"
#include "layout/coded_writer.h"

namespace ktrt {

namespace {

// Adding and subtracting 1.5 · 2^23 rounds half to even.
constexpr float kRound = 12582912.0f;
constexpr float kE2m1[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};

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
    const auto code = static_cast<int>((std::clamp(value, -8.0f, 7.0f) + kRound) - kRound);
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

// Σ (w − scale · code)² of INT4 codes; count is a multiple of kLanes. In lanes and without calls,
// so that it vectorises on baseline x86-64.
float int4_error(const float* weights, int count, float scale) {
  constexpr int kLanes = 8;
  const float inverse = 1.0f / scale;
  float sums[kLanes] = {};
  for (int first = 0; first < count; first += kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      const float w = weights[first + i];
      float code = w * inverse;
      code = code < -8.0f ? -8.0f : code;
      code = code > 7.0f ? 7.0f : code;
      code = (code + kRound) - kRound;
      const float error = w - scale * code;
      sums[i] += error * error;
    }
  }
  float sum = 0.0f;
  for (const float lane : sums) sum += lane;
  return sum;
}

// The BF16 scale with the least squared error among those that give `largest`, the weight of the
// largest magnitude, about the code -8, or about 7: 8.2 % of normally distributed weights in groups
// of 32, where 34 times as many candidates reach 8.1 and largest / 7 alone 9.7. 0 where none has a
// finite inverse.
float int4_scale(const float* weights, int count, float largest) {
  constexpr float kCodes[] = {-7.1f, -7.3f, -7.5f, -7.7f, -7.9f, -8.1f,
                              -8.3f, 6.2f,  6.45f, 6.7f,  6.95f, 7.2f};
  float best = 0.0f;
  float least = std::numeric_limits<float>::infinity();
  for (const float code : kCodes) {
    const float scale = bf16_to_f32(f32_to_bf16(largest / code));
    if (!std::isfinite(1.0f / scale)) continue;
    const float error = int4_error(weights, count, scale);
    if (error < least || best == 0.0f) {
      least = error;
      best = scale;
    }
  }
  return best;
}

bool is_int4(WeightFormat format) {
  return traits_of(format).scale == ScaleKind::kInTile && format != WeightFormat::kMxfp4;
}

// The best scale of a group's weights, in the format's precision; 0 for zeros.
float group_scale(WeightFormat format, const float* weights, int count) {
  float largest = 0.0f;
  for (int i = 0; i < count; ++i) {
    if (std::fabs(weights[i]) > std::fabs(largest)) largest = weights[i];
  }
  if (largest == 0.0f) return 0.0f;
  if (is_int4(format)) return int4_scale(weights, count, largest);
  largest = std::fabs(largest);
  if (!traits_of(format).group || traits_of(format).scale == ScaleKind::kPerBlock) {
    const float scale = largest / 448.0f;
    return std::isfinite(1.0f / scale) ? scale : 0.0f;
  }
  return std::ldexp(1.0f, std::clamp(std::ilogb(largest) - 2, -126, 127));
}

// Rows of a strip as floats, zeros after n and k.
struct StripValues {
  std::vector<float> values;          // [32][columns]
  std::vector<std::uint8_t> encoded;  // [32][columns], as a checkpoint has them
  int columns;
  bool finite = true;

  StripValues(const TensorView& w, const PackedLayout& layout, int strip)
      : values(static_cast<std::size_t>(kStripRows) * static_cast<std::size_t>(layout.padded_k())),
        encoded(values.size()),
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
  std::uint8_t* codes(int r) { return encoded.data() + std::int64_t{r} * columns; }
};

// Codes of `count` columns of a row from `first` on, all of one scale, into the row's bytes as a
// checkpoint has them.
void encode_columns(WeightFormat format, const float* weights, int first, int count, float scale,
                    std::uint8_t* codes) {
  if (scale == 0.0f) return;
  const float inverse = 1.0f / scale;
  const bool bytes = traits_of(format).bits == 8;
  for (int k = first; k < first + count; ++k) {
    const std::uint8_t code = nearest_code(format, weights[k] * inverse);
    std::uint8_t& byte = codes[bytes ? k : k / 2];
    byte = static_cast<std::uint8_t>(byte | code << (bytes ? 0 : k % 2 * 4));
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
      encode_columns(WeightFormat::kFp8, strip.row(r), first, count, scale, strip.codes(r));
    }
  }
}

void encode_groups(StripWriter& writer, StripValues& strip, WeightFormat format, int row, int k) {
  const int group = traits_of(format).group;
  for (int first = 0; first < k; first += group) {
    const int count = std::min(group, k - first);
    // The padding's zeros have no error.
    const float scale = group_scale(format, strip.row(row) + first, group);
    encode_columns(format, strip.row(row), first, count, scale, strip.codes(row));
    const bf16_t bits = f32_to_bf16(scale);
    const auto exponent =
        static_cast<std::uint8_t>(scale == 0.0f ? kE8m0One : std::ilogb(scale) + kE8m0One);
    writer.group_scale(row, first / group,
                       format == WeightFormat::kMxfp4 ? static_cast<const void*>(&exponent)
                                                      : static_cast<const void*>(&bits));
  }
}

}  // namespace

bool encode_coded_strip(const TensorView& w, const PackedMatrix& packed, int strip) {
  const PackedLayout& layout = packed.layout;
  const WeightFormat format = layout.format();
  StripValues values(w, layout, strip);
  StripWriter writer(packed, strip);
  if (!values.finite) return false;
  const int rows = std::min(kStripRows, layout.n() - strip * kStripRows);
  if (layout.traits().scale == ScaleKind::kPerBlock) encode_blocks(writer, values, layout.k());
  for (int r = 0; r < rows; ++r) {
    if (layout.traits().scale == ScaleKind::kInTile) {
      encode_groups(writer, values, format, r, layout.k());
    } else if (layout.traits().scale == ScaleKind::kPerChannel) {
      const float scale = group_scale(format, values.row(r), layout.k());
      writer.outer_scale(r) = scale;
      encode_columns(format, values.row(r), 0, layout.k(), scale, values.codes(r));
    }
    writer.row(r, values.codes(r), layout.k());
  }
  return true;
}

}  // namespace ktrt
