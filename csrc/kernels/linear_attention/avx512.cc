#include "kernels/linear_attention/body.h"

namespace ktrt {

extern const LinearAttentionKernel linear_attention_avx512;
const LinearAttentionKernel linear_attention_avx512 = {
    "avx512", state_steps, short_conv, selective_scan, floats, unit_vector, exponentials};

}  // namespace ktrt
