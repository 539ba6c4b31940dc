#include "layout/format_traits.h"

#include "base/check.h"

namespace ktrt {

namespace {

constexpr bool rows_are_in_order() {
  for (std::size_t i = 0; i < kNumWeightFormats; ++i) {
    if (kFormatTraits[i].format != static_cast<WeightFormat>(i)) return false;
  }
  return true;
}
static_assert(rows_are_in_order());

}  // namespace

WeightFormat parse_format(const std::string& name) {
  std::string known;
  for (const FormatTraits& traits : kFormatTraits) {
    if (name == traits.name) return traits.format;
    known += (known.empty() ? "'" : ", '") + std::string(traits.name) + "'";
  }
  KTRT_CHECK(false, "weight_format is '" << name << "', expected one of " << known);
  return WeightFormat::kBf16;
}

}  // namespace ktrt
