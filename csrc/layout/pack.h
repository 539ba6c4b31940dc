// Packing a row-major matrix into kt_kernel's layout, and back.
#pragma once

#include <cstdint>

#include "base/bf16.h"
#include "base/tensor_view.h"
#include "layout/packed_layout.h"

namespace ktrt {

// Where one packed matrix lives. `scales` is null for formats without scales outside of the tiles,
// `sums` where rows of activations are not quantised.
struct PackedMatrix {
  PackedLayout layout;
  std::uint8_t* codes = nullptr;  // layout.code_bytes()
  float* scales = nullptr;  // layout.scales(): weight = scale · code, INT4: scale · 16 · code
  std::int32_t* sums = nullptr;  // [padded_n]: sum of the row's codes (INT4: of 16 · code), for
                                 // unsigned activations
};

// Packs rows [32·strip, 32·strip + 32) of w [n, k] (float32, float16 or bfloat16; rounded to
// bfloat16 first, as kt_kernel receives it), each as the format's codec says. An all-zero row gives
// scale 0. The caller has checked w's shape and dtype. Strips are independent. Returns false if a
// value is infinite or NaN: the strip is then not usable.
bool pack_strip(const TensorView& w, const PackedMatrix& packed, int strip);

// The packed matrix as float32, row-major [n, k].
void unpack(const PackedMatrix& packed, float* out);

// bfloat16 values of one row of a float tensor; `row` is its address, `count` its length.
void row_to_bf16(const std::byte* row, DType dtype, int count, bf16_t* out);

}  // namespace ktrt
