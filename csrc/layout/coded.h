// Coded formats: weights as checkpoints ship them, packed without a rounding.
//
//   fp8, fp8_channel   E4M3 codes (OCP 8-bit floating point specification 1.0); a float32 scale per
//                      block of 128 × 128, or per output row
//   int4_g32, 64, 128  two's complement nibbles; a BF16 scale per output row and group of columns
//   mxfp4              E2M1 nibbles, an E8M0 byte per output row and 32 columns (OCP microscaling
//                      formats 1.0): scale 2^(byte − 127)
//
// A tile has two halves of 16 rows, each sixteen vectors of 64 bytes:
//   8 bits  vector v holds columns 4v … 4v + 3; in its 16 bytes l, byte 8h + 2o + i is row 4l + o,
//           column 4v + 2h + i. Interleaved with other bytes, the low and the high 8 of every 16
//           bytes become the words of two vectors in BF16's order.
//   4 bits  vector v holds columns 8v … 8v + 7; 32-bit word o is row o, nibble j of its low half
//           column 8v + 2j, of its high half 8v + 2j + 1. Shifted by 4j, its 16-bit words end with
//           the codes of a vector in BF16's order.
// Scales of kInTile follow: [group][32 rows].
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/tensor_view.h"
#include "layout/pack.h"

namespace ktrt {

// One matrix [n, k] as a checkpoint ships it.
struct CodedSource {
  // uint8 [n, k] E4M3, or [n, ⌈k/2⌉] nibbles, the first column in the low half; rows may lie apart.
  TensorView codes;
  // fp8: float32 [⌈n/32⌉, ⌈k/128⌉]; fp8_channel: float32 [n]; int4: bfloat16 [n, ⌈k/group⌉];
  // mxfp4: uint8 [n, ⌈k/32⌉].
  TensorView scales;
};

// Throws std::invalid_argument naming the array, found and expected: shapes, dtypes, sizes.
void check_coded(const CodedSource& source, WeightFormat format, int n, int k);

// Packs rows [32·strip, 32·strip + 32) of the source, `row` of which is the matrix's first (a
// multiple of 32). Returns false for a NaN code, or a scale that is not finite or whose product
// with the largest code is not.
bool pack_coded_strip(const CodedSource& source, int row, const PackedMatrix& packed, int strip);

// Encodes the strip from floats, as pack_strip() does for the other formats: each scale is that
// which gives the group's weights the least squared error among some candidates.
bool encode_coded_strip(const TensorView& w, const PackedMatrix& packed, int strip);

// The strip's rows as float32 [32][k], `stride` apart.
void decode_coded_strip(const PackedMatrix& packed, int strip, float* out, std::int64_t stride);

// The value of a code, NaN for E4M3's.
float coded_value(WeightFormat format, std::uint8_t code);

}  // namespace ktrt
