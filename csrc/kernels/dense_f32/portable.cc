// Dense float32 in plain C++: four sums for every dot product, which any machine adds side by side.
#include "kernels/dense_bf16/body.h"

namespace ktrt {
namespace {

constexpr int kLanes = 4;

struct Vector {
  using Value = float;
  struct Values {
    float at[kLanes];
  };
  using Sum = Values;
  static constexpr int kWidth = kLanes;
  static constexpr int kBlockRows = 2;
  static constexpr int kStreams = 1;

  static Sum zero() { return {}; }
  static Values load(const float* p) { return load_tail(p, kWidth); }
  static Values load_tail(const float* p, int count) {
    Values values{};
    for (int i = 0; i < count; ++i) values.at[i] = p[i];
    return values;
  }
  static Sum add(Sum sum, const Values& w, const Values& x) {
    for (int i = 0; i < kLanes; ++i) sum.at[i] += w.at[i] * x.at[i];
    return sum;
  }
  static float total(const Sum& sum) { return (sum.at[0] + sum.at[2]) + (sum.at[1] + sum.at[3]); }
  static void store_totals(const Sum& a, const Sum& b, const Sum& c, const Sum& d, float* out) {
    out[0] = total(a);
    out[1] = total(b);
    out[2] = total(c);
    out[3] = total(d);
  }
};

}  // namespace

extern const DenseF32Kernel dense_f32_portable;
const DenseF32Kernel dense_f32_portable = {"portable", Vector::kBlockRows, dot<Vector>};

}  // namespace ktrt
