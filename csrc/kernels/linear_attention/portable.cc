#include "kernels/linear_attention/body.h"

namespace ktrt {

extern const LinearAttentionKernel linear_attention_portable;
const LinearAttentionKernel linear_attention_portable = {
    "portable", state_steps, short_conv, selective_scan, floats, unit_vector, exponentials};

}  // namespace ktrt
