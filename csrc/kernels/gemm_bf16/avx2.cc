#include "kernels/avx2/products.h"
#include "kernels/gemm_bf16/widened_body.h"

namespace ktrt {
namespace {

using Body = WidenedBf16<Bf16Products256, expand_rows>;

}  // namespace

extern const GemmKernel gemm_bf16_avx2;
const GemmKernel gemm_bf16_avx2 = {"avx2", one_strip<Body>,           expand_rows, 0,
                                   false,  strips_side_by_side<Body>, kMaxSideRows};

}  // namespace ktrt
