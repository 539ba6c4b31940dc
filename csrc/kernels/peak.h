// The arithmetic peak of an instruction set, which GEMMs are compared with.
#pragma once

#include <vector>

#include "cpu/isa.h"
#include "kernels/peak_loop.h"

namespace ktrt {

// The loops that `features` can run at `level` or below, older instruction sets first.
std::vector<const PeakLoop*> peak_loops(Isa level, const CpuFeatures& features);

// Multiplications and additions per second of the calling thread over about `seconds`.
double measure_peak(const PeakLoop& loop, double seconds);

}  // namespace ktrt
