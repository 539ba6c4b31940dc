// A packed matrix that owns its memory, for tests.
#pragma once

#include <cstdint>
#include <vector>

#include "helpers/aligned_vector.h"
#include "helpers/views.h"
#include "layout/pack.h"

namespace ktrt::testing {

struct OwnedMatrix {
  PackedLayout layout;
  AlignedVector<std::uint8_t> codes;
  AlignedVector<float> scales;
  AlignedVector<std::int32_t> sums;
  bool finite = true;

  PackedMatrix view() {
    PackedMatrix matrix{layout, codes.data(), nullptr, nullptr};
    if (!scales.empty()) matrix.scales = scales.data();
    if (!sums.empty()) matrix.sums = sums.data();
    return matrix;
  }
};

// Memory filled with what no packed matrix holds.
inline OwnedMatrix allocate(WeightFormat format, int n, int k) {
  OwnedMatrix matrix;
  matrix.layout = PackedLayout(format, n, k);
  matrix.codes.assign(matrix.layout.code_bytes(), 0xee);
  matrix.scales.assign(matrix.layout.scales(), -1.0f);
  matrix.sums.assign(matrix.layout.sums(), -1);
  return matrix;
}

inline OwnedMatrix pack(WeightFormat format, const TensorView& w) {
  OwnedMatrix matrix = allocate(format, static_cast<int>(w.shape[0]), static_cast<int>(w.shape[1]));
  for (int strip = 0; strip < matrix.layout.strips(); ++strip) {
    matrix.finite = pack_strip(w, matrix.view(), strip) && matrix.finite;
  }
  return matrix;
}

inline OwnedMatrix pack(WeightFormat format, int n, int k, const std::vector<float>& w) {
  return pack(format, view_of(w, {n, k}, "w"));
}

}  // namespace ktrt::testing
