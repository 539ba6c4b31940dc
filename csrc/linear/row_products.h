// Products of rows with any matrix in memory, on the engine's threads: y = x Wᵀ + bias in BF16 or
// float32, for the small layers that are no DenseLinear (routers) and for models in float32.
//
// torch's own products choose kernels and blocks by the number of rows, so that a row's bits depend
// on its neighbours; here they do not (linear/dense_panels.h).
#pragma once

#include <cstdint>
#include <memory>
#include <utility>

#include "engine/engine.h"
#include "engine/work_queue.h"

namespace ktrt {

// Contiguous arrays by address, with their numbers of elements. x [rows, in], weight [columns, in],
// bias [columns] or null, out [rows, columns].
template <class Value>
struct RowProduct {
  const Value* x;
  std::int64_t x_count;
  const Value* weight;
  std::int64_t weight_count;
  const Value* bias;
  Value* out;
  std::int64_t out_count;
  std::int64_t in;

  std::int64_t rows() const { return x_count / in; }
  std::int64_t columns() const { return weight_count / in; }
};

class RowProducts {
 public:
  explicit RowProducts(std::shared_ptr<Engine> engine);

  // BF16 with float32 sums, one rounding after the bias; or float32. Throw std::invalid_argument:
  // sizes, addresses; std::runtime_error once the engine is closed.
  void multiply(const RowProduct<std::uint16_t>& product);
  void multiply(const RowProduct<float>& product);

 private:
  const std::shared_ptr<Engine> engine_;
  PieceQueue queue_;
};

}  // namespace ktrt
