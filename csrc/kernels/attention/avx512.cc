#include "kernels/attention/avx512_common.h"

namespace ktrt {

extern const AttentionKernel attention_avx512;
const AttentionKernel attention_avx512 = {"avx512",       Avx512::kWidth,  pack<Avx512>,
                                          scores<Avx512>, softmax<Avx512>, values<Avx512>,
                                          merge<Avx512>,  nullptr};

}  // namespace ktrt
