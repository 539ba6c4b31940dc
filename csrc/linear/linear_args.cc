#include "linear/linear_args.h"

#include "base/address_range.h"
#include "base/bf16.h"
#include "base/check.h"

namespace ktrt {

std::int64_t check_rows(const void* x, std::int64_t x_count, const void* out,
                        std::int64_t out_count, std::int64_t in_features,
                        std::int64_t out_features) {
  check_address_range("x", x, x_count, sizeof(bf16_t));
  check_address_range("out", out, out_count, sizeof(bf16_t));
  const std::int64_t rows = x_count / in_features;
  // Not rows * out_features, which may be above 2^63.
  KTRT_CHECK(rows * in_features == x_count && out_count % out_features == 0 &&
                 out_count / out_features == rows,
             "x has " << x_count << " elements and out " << out_count << ", expected rows of "
                      << in_features << " and as many of " << out_features);
  KTRT_CHECK(rows == 0 || (x != nullptr && out != nullptr), "x or out is a null pointer");
  return rows;
}

void check_adapter_ids(const AdapterIds& adapters) {
  check_address_range("adapter_ids", adapters.ids, adapters.count, sizeof(std::int32_t));
}

}  // namespace ktrt
