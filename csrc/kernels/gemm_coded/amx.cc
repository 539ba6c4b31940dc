#include "kernels/gemm_coded/amx_body.h"

namespace ktrt {

namespace {

constexpr GemmKernel kFixed[kNumCodedFormats] = {
    fixed_coded_kernel<HardwareTiles, WeightFormat::kFp8>("amx_fixed"),
    fixed_coded_kernel<HardwareTiles, WeightFormat::kFp8Channel>("amx_fixed"),
    fixed_coded_kernel<HardwareTiles, WeightFormat::kInt4G32>("amx_fixed"),
    fixed_coded_kernel<HardwareTiles, WeightFormat::kInt4G64>("amx_fixed"),
    fixed_coded_kernel<HardwareTiles, WeightFormat::kInt4G128>("amx_fixed"),
    fixed_coded_kernel<HardwareTiles, WeightFormat::kMxfp4>("amx_fixed"),
};

}  // namespace

extern const GemmKernel gemm_coded_amx[kNumCodedFormats];
const GemmKernel gemm_coded_amx[kNumCodedFormats] = {
    coded_kernel<HardwareTiles, WeightFormat::kFp8>("amx", &kFixed[0]),
    coded_kernel<HardwareTiles, WeightFormat::kFp8Channel>("amx", &kFixed[1]),
    coded_kernel<HardwareTiles, WeightFormat::kInt4G32>("amx", &kFixed[2]),
    coded_kernel<HardwareTiles, WeightFormat::kInt4G64>("amx", &kFixed[3]),
    coded_kernel<HardwareTiles, WeightFormat::kInt4G128>("amx", &kFixed[4]),
    coded_kernel<HardwareTiles, WeightFormat::kMxfp4>("amx", &kFixed[5]),
};

}  // namespace ktrt
