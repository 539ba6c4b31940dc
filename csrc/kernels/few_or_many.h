// A GEMM kernel's entry points from two bodies: strips of few rows side by side, and one strip of
// many rows. Included by the kernels' ISA files only.
//
// Body::few<kRows, kStrips>(strips) takes up to Body::kSideRows rows, Body::many(strip) more.
// Scales and the LoRA expand, which are read last, are prefetched here.
#pragma once

#include "kernels/side_by_side.h"

namespace ktrt {
namespace {

template <class Body, int kRows = Body::kSideRows>
void strip_of_rows(const GemmArgs& g) {
  if (g.rows > kRows) return Body::many(g);
  if (g.rows == kRows) return Body::template few<kRows, 1>(&g);
  if constexpr (kRows > 1) strip_of_rows<Body, kRows - 1>(g);
}

template <class Body>
void one_strip(const GemmArgs& g) {
  if (Body::kHasScales) prefetch_scales(g);
  prefetch_expand(g);
  strip_of_rows<Body>(g);
}

template <class Body>
void strips_side_by_side(const GemmArgs* strips, int count) {
  for (int i = 0; Body::kHasScales && i < count; ++i) prefetch_scales(strips[i]);
  for_each_strip_group<Body::kSideRows>(
      strips, count, strip_of_rows<Body>,
      [](auto rows, auto n, const GemmArgs* g) { Body::template few<rows, n>(g); });
}

}  // namespace
}  // namespace ktrt
