// The weight formats; format_traits.h describes each.
#pragma once

namespace ktrt {

// In the order of the rows of kFormatTraits.
enum class WeightFormat { kBf16, kInt8, kInt4 };
constexpr int kNumWeightFormats = 3;
constexpr WeightFormat kWeightFormats[kNumWeightFormats] = {
    WeightFormat::kBf16, WeightFormat::kInt8, WeightFormat::kInt4};

}  // namespace ktrt
