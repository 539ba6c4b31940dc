// Moving packed weights between matrices that are cut differently.
#pragma once

#include <cstdint>

#include "layout/pack.h"

namespace ktrt {

// Copies strip `from_strip` to `to_strip` (codes and scales) and computes the sums of its rows.
// Both matrices have one format and the same padded k; tiles are the same bytes in both, only their
// places differ. `from.sums` is not read.
void copy_strip(const PackedMatrix& from, int from_strip, const PackedMatrix& to, int to_strip);

}  // namespace ktrt
