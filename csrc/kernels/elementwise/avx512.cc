#include "kernels/elementwise/body.h"

namespace ktrt {

extern const ElementwiseKernels elementwise_avx512;
const ElementwiseKernels elementwise_avx512 = {"avx512", quantize_row, f32_to_bf16,
                                               silu_mul, weighted_add, activate,
                                               add_bias, to_tile,      rms_norm};

}  // namespace ktrt
