// Dot products of rows in either type, for the tests of both dense families.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/bf16.h"
#include "helpers/aligned_vector.h"
#include "helpers/random.h"
#include "kernels/kernel_table.h"

namespace ktrt::testing {

inline std::size_t place(std::int64_t row, std::int64_t width, std::int64_t column) {
  return static_cast<std::size_t>(row * width + column);
}

inline double number(std::uint16_t bits) { return bf16_to_f32(bits); }
inline double number(float value) { return value; }

// Value: std::uint16_t (BF16) or float. X [rows][k] and W [columns][k], both with rows further
// apart than they are long.
template <class Value>
struct DotCase {
  DotCase(int rows_, int columns_, int k_) : rows(rows_), columns(columns_), k(k_) {
    Random random(static_cast<std::uint64_t>(k));
    x = values(random, place(rows, k + 3, 0));
    w = values(random, place(columns, k + 5, 0));
  }

  static std::vector<Value> values(Random& random, std::size_t count) {
    std::vector<Value> made(count);
    for (Value& value : made) {
      if constexpr (std::is_same_v<Value, float>) {
        value = random.normal();
      } else {
        value = f32_to_bf16(random.normal());
      }
    }
    return made;
  }

  DotArgs<Value> args(float* c) const {
    DotArgs<Value> dot{};
    dot.x = x.data();
    dot.x_stride = k + 3;
    dot.rows = rows;
    dot.w = w.data();
    dot.w_stride = k + 5;
    dot.columns = columns;
    dot.k = k;
    dot.last = true;
    dot.c = c;
    dot.c_stride = columns + 2;
    return dot;
  }

  std::vector<float> result() const {
    return std::vector<float>(place(rows, columns + 2, 0), kGuard);
  }

  std::vector<float> run(const auto& kernel, bool cold = false) const {
    std::vector<float> c = result();
    DotArgs<Value> dot = args(c.data());
    dot.cold = cold;
    if (cold) {
      dot.next = reinterpret_cast<const std::uint8_t*>(w.data());
      dot.next_bytes = static_cast<std::int64_t>(w.size() * sizeof(Value));
    }
    kernel.dot(dot);
    return c;
  }

  static constexpr float kGuard = 123.0f;
  int rows, columns, k;
  std::vector<Value> x, w;
};

inline const std::vector<std::pair<int, int>> kDotShapes = {
    {1, 1}, {4, 7}, {5, 16}, {9, 31}, {8, 32}, {3, 33}, {6, 100}, {13, 517}, {4, 2048}, {29, 290}};

template <class Value>
void expect_sums_in_double(const auto& kernel) {
  for (int rows = 1; rows <= kernel.block_rows; ++rows) {
    for (const auto& [columns, k] : kDotShapes) {
      const DotCase<Value> dot(rows, columns, k);
      const std::vector<float> c = dot.run(kernel);
      for (int r = 0; r < rows; ++r) {
        for (int n = 0; n < columns; ++n) {
          double sum = 0.0;
          double magnitude = 0.0;
          for (int i = 0; i < k; ++i) {
            const double product =
                number(dot.x[place(r, k + 3, i)]) * number(dot.w[place(n, k + 5, i)]);
            sum += product;
            magnitude += std::abs(product);
          }
          ASSERT_NEAR(c[place(r, columns + 2, n)], sum, 1e-6 * magnitude) << rows << " " << k;
        }
        ASSERT_EQ(c[place(r, columns + 2, columns)], dot.kGuard) << "written beyond the row";
      }
    }
  }
}

template <class Value>
void expect_bits_of_each_alone(const auto& kernel) {
  for (const auto& [columns, k] : kDotShapes) {
    const DotCase<Value> all(kernel.block_rows, columns, k);
    const std::vector<float> expected = all.run(kernel);
    ASSERT_EQ(all.run(kernel, true), expected) << "from memory";
    for (int rows = 1; rows < kernel.block_rows; ++rows) {
      DotCase<Value> fewer = all;
      fewer.rows = rows;
      const std::vector<float> c = fewer.run(kernel);
      const auto end = expected.begin() + static_cast<std::ptrdiff_t>(c.size());
      ASSERT_EQ(c, std::vector<float>(expected.begin(), end)) << rows;
      ASSERT_EQ(fewer.run(kernel, true), c) << rows << " from memory";
    }
    DotCase<Value> one = all;
    one.columns = 1;
    for (int n = 0; n < columns; ++n) {
      const std::vector<float> c = one.run(kernel);
      for (int r = 0; r < one.rows; ++r) {
        ASSERT_EQ(c[place(r, 3, 0)], expected[place(r, columns + 2, n)]) << n;
      }
      one.w.erase(one.w.begin(), one.w.begin() + one.k + 5);
      one.w.resize(all.w.size());
    }
  }
}

template <class Value>
void expect_bits_of_parts(const auto& kernel) {
  for (const int k : {33, 100, 517}) {
    const DotCase<Value> dot(kernel.block_rows, 7, k);
    AlignedVector<std::uint8_t> sums(place(dot.rows, dot.columns * kDenseSumBytes, 0));
    std::vector<float> c = dot.result();
    for (int first = 0; first < k; first += 2 * kDenseStep) {
      DotArgs<Value> part = dot.args(c.data());
      part.x += first;
      part.w += first;
      part.k = std::min(2 * kDenseStep, k - first);
      part.sums = sums.data();
      part.resume = first > 0;
      part.last = first + part.k == k;
      kernel.dot(part);
    }
    ASSERT_EQ(c, dot.run(kernel)) << k;
  }
}

}  // namespace ktrt::testing
