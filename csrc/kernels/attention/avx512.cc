#include "kernels/attention/avx512_common.h"

namespace ktrt {

extern const AttentionKernel attention_avx512;
const AttentionKernel attention_avx512 = {"avx512",       Avx512::kWidth,  pack<Avx512>,
                                          scores<Avx512>, softmax<Avx512>, values<Avx512>,
                                          merge<Avx512>,  nullptr};

// In avx512_bf16.cc; all else is the same.
void attention_bf16_scores(const AttentionScoreArgs& args);
extern const AttentionKernel attention_avx512_bf16;
const AttentionKernel attention_avx512_bf16 = {"avx512_bf16",  Avx512::kWidth,       pack<Avx512>,
                                               scores<Avx512>, softmax<Avx512>,      values<Avx512>,
                                               merge<Avx512>,  attention_bf16_scores};

}  // namespace ktrt
