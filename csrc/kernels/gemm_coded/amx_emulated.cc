// The AMX body on emulated tiles, for tests on machines without AMX.
#include "kernels/gemm_coded/amx_body.h"

namespace ktrt {

namespace {

constexpr GemmKernel kFixed[kNumCodedFormats] = {
    fixed_coded_kernel<EmulatedTiles, WeightFormat::kFp8>("amx_emulated_fixed"),
    fixed_coded_kernel<EmulatedTiles, WeightFormat::kFp8Channel>("amx_emulated_fixed"),
    fixed_coded_kernel<EmulatedTiles, WeightFormat::kInt4G32>("amx_emulated_fixed"),
    fixed_coded_kernel<EmulatedTiles, WeightFormat::kInt4G64>("amx_emulated_fixed"),
    fixed_coded_kernel<EmulatedTiles, WeightFormat::kInt4G128>("amx_emulated_fixed"),
    fixed_coded_kernel<EmulatedTiles, WeightFormat::kMxfp4>("amx_emulated_fixed"),
};

}  // namespace

extern const GemmKernel gemm_coded_amx_emulated[kNumCodedFormats];
const GemmKernel gemm_coded_amx_emulated[kNumCodedFormats] = {
    coded_kernel<EmulatedTiles, WeightFormat::kFp8>("amx_emulated", &kFixed[0]),
    coded_kernel<EmulatedTiles, WeightFormat::kFp8Channel>("amx_emulated", &kFixed[1]),
    coded_kernel<EmulatedTiles, WeightFormat::kInt4G32>("amx_emulated", &kFixed[2]),
    coded_kernel<EmulatedTiles, WeightFormat::kInt4G64>("amx_emulated", &kFixed[3]),
    coded_kernel<EmulatedTiles, WeightFormat::kInt4G128>("amx_emulated", &kFixed[4]),
    coded_kernel<EmulatedTiles, WeightFormat::kMxfp4>("amx_emulated", &kFixed[5]),
};

}  // namespace ktrt
