// INT8 GEMM on AVX2: VPMADDUBSW saturates unsigned times signed bytes, so the products of few and
// of many rows are made in other ways (kernels/avx2/products.h), both exactly.
#include "kernels/avx2/integer.h"
#include "kernels/avx2/products.h"
#include "kernels/chunks.h"
#include "kernels/few_or_many.h"

namespace ktrt {
namespace {

struct Body {
  static constexpr int kBlockBytes = 3584;
  static constexpr bool kHasScales = true;
  static constexpr int kSideRows = kMaxSideRows;

  template <int kRows, int kStrips>
  static void few(const GemmArgs* g) {
    burst_sums<SignedProducts256, StepBurst<SignedProducts256>, kBlockBytes, kRows, kStrips>(g,
                                                                                             g->k);
    for (int s = 0; s < kStrips; ++s) finish_sums<false>(g[s]);
  }

  static void many(const GemmArgs& g) {
    chunk_sums<Int16Products256, WidenedTiles<Int16Products256, kBlockBytes>>(g, g.k);
    finish_sums<false>(g);
  }
};

}  // namespace

extern const GemmKernel gemm_int8_avx2;
const GemmKernel gemm_int8_avx2 = {"avx2", one_strip<Body>,           expand_rows, 0,
                                   false,  strips_side_by_side<Body>, kMaxSideRows};

}  // namespace ktrt
