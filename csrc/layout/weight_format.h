// The weight formats; format_traits.h describes each.
#pragma once

namespace ktrt {

// In the order of the rows of kFormatTraits.
enum class WeightFormat {
  kBf16,
  kInt8,
  kInt4,
  kFp8,
  kFp8Channel,
  kInt4G32,
  kInt4G64,
  kInt4G128,
  kMxfp4
};
constexpr int kNumWeightFormats = 9;
constexpr WeightFormat kWeightFormats[kNumWeightFormats] = {
    WeightFormat::kBf16,    WeightFormat::kInt8,       WeightFormat::kInt4,
    WeightFormat::kFp8,     WeightFormat::kFp8Channel, WeightFormat::kInt4G32,
    WeightFormat::kInt4G64, WeightFormat::kInt4G128,   WeightFormat::kMxfp4};

// Formats that kt_kernel packs: the first ones.
constexpr WeightFormat kKtFormats[] = {WeightFormat::kBf16, WeightFormat::kInt8,
                                       WeightFormat::kInt4};

// Formats that checkpoints ship (layout/coded.h): the last ones. Activations stay BF16.
constexpr int kFirstCodedFormat = static_cast<int>(WeightFormat::kFp8);
constexpr int kNumCodedFormats = kNumWeightFormats - kFirstCodedFormat;
constexpr bool is_coded(WeightFormat format) {
  return static_cast<int>(format) >= kFirstCodedFormat;
}
constexpr int coded_index(WeightFormat format) {
  return static_cast<int>(format) - kFirstCodedFormat;
}

}  // namespace ktrt
