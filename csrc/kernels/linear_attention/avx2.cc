#include "kernels/linear_attention/body.h"

namespace ktrt {

extern const LinearAttentionKernel linear_attention_avx2;
const LinearAttentionKernel linear_attention_avx2 = {
    "avx2", state_steps, short_conv, selective_scan, floats, unit_vector, exponentials};

}  // namespace ktrt
