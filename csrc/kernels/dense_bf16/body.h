// Dot products of BF16 or float32 rows, over a vector type V. Included by the ISA files only.
//
// V::Value is the type of X's and W's numbers. V::kStreams columns are read side by side where W
// comes from memory (1: none). V::Sum is a vector of partial sums, V::Values the V::kWidth values
// along k that one step takes, V::load and V::load_tail (zeros after `count` values) make them,
// V::add adds their products, and V::total and V::store_totals add the lanes of one Sum and of
// four, in the same order.
#pragma once

#include <stdint.h>

#include "kernels/kernel_table.h"
#include "kernels/unrolled.h"

namespace ktrt {
namespace {

constexpr int kLine = 64;
constexpr int kColumnBlock = 4;  // columns of a register block
constexpr int kStreamRows = 3;

// Lines on their way into the L2 cache, asked for evenly over the steps of a call: the memory then
// delivers while the products are computed. In bursts of a few thousand bytes each of the two waits
// for the other, and six rows take 2.4 times as long.
class Ahead {
 public:
  Ahead(const uint8_t* next, int64_t bytes, int64_t steps)
      : at_(next), end_(next + bytes), per_step_(steps > 0 ? (bytes + steps - 1) / steps : 0) {}

  inline __attribute__((always_inline)) void step() {
    for (due_ += per_step_; due_ >= kLine && at_ < end_; due_ -= kLine, at_ += kLine) {
      __builtin_prefetch(at_, 0, 2);
    }
  }

 private:
  const uint8_t* at_;
  const uint8_t* const end_;
  const int64_t per_step_;
  int64_t due_ = 0;
};

template <class V, int kColumns, int kRows>
struct DotBlock {
  typename V::Sum sums[kColumns][kRows];

  inline __attribute__((always_inline)) void clear() {
#pragma GCC unroll 8
    for (int n = 0; n < kColumns; ++n) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sums[n][r] = V::zero();
    }
  }

  inline __attribute__((always_inline)) void run(const DotArgs<typename V::Value>& d,
                                                 const typename V::Value* w, Ahead& ahead) {
    const int whole = d.k - d.k % V::kWidth;
    for (int k = 0; k < whole; k += V::kWidth) {
      ahead.step();
      step(d, w + k, d.x + k, [](const typename V::Value* p) { return V::load(p); });
    }
    if (whole < d.k) {
      const int count = d.k - whole;
      step(d, w + whole, d.x + whole,
           [count](const typename V::Value* p) { return V::load_tail(p, count); });
    }
  }

  template <class Load>
  inline __attribute__((always_inline)) void step(const DotArgs<typename V::Value>& d,
                                                  const typename V::Value* w,
                                                  const typename V::Value* x, Load load) {
    typename V::Values values[kColumns];
#pragma GCC unroll 8
    for (int n = 0; n < kColumns; ++n) values[n] = load(w + n * d.w_stride);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const typename V::Values row = load(x + r * d.x_stride);
#pragma GCC unroll 8
      for (int n = 0; n < kColumns; ++n) sums[n][r] = V::add(sums[n][r], values[n], row);
    }
  }

  // To or from `kept`, kDenseSumBytes each.
  template <class Move>
  inline __attribute__((always_inline)) void move_sums(uint8_t* kept, Move move) {
#pragma GCC unroll 8
    for (int n = 0; n < kColumns; ++n) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        move(sums[n][r],
             reinterpret_cast<typename V::Sum*>(kept + (n * kRows + r) * kDenseSumBytes));
      }
    }
  }
};

// kRows rows times kStreams columns side by side, `apart` columns from each other, the first one
// being column n: kStreamSteps steps of a column, then of the next one. The sums of a column are
// made in the same order as ever.
template <class V, int kRows, int kStreams>
inline void dot_streams(const DotArgs<typename V::Value>& d, int n, int apart) {
  using Value = typename V::Value;
  constexpr int kStreamSteps = 256 / (V::kWidth * static_cast<int>(sizeof(Value)));
  constexpr int kStride = V::kWidth * kStreamSteps;
  typename V::Sum sums[kStreams][kRows];
  unrolled<kStreams>([&](auto s) { unrolled<kRows>([&](auto r) { sums[s][r] = V::zero(); }); });
  const Value* w = d.w + n * d.w_stride;
  const int64_t stride = apart * d.w_stride;
  const auto add = [&](auto s, const Value* column, const Value* x, auto load) {
    const typename V::Values values = load(column);
    unrolled<kRows>(
        [&](auto r) { sums[s][r] = V::add(sums[s][r], values, load(x + r * d.x_stride)); });
  };
  const auto whole = [](const Value* p) { return V::load(p); };
  int k = 0;
  for (; k + kStride <= d.k; k += kStride) {
    unrolled<kStreams>([&](auto s) {
      unrolled<kStreamSteps>([&](auto i) {
        const int at = k + i * V::kWidth;
        add(s, w + s * stride + at, d.x + at, whole);
      });
    });
  }
  for (; k + V::kWidth <= d.k; k += V::kWidth) {
    unrolled<kStreams>([&](auto s) { add(s, w + s * stride + k, d.x + k, whole); });
  }
  if (k < d.k) {
    const auto tail = [count = d.k - k](const Value* p) { return V::load_tail(p, count); };
    unrolled<kStreams>([&](auto s) { add(s, w + s * stride + k, d.x + k, tail); });
  }
  static_assert(kStreams % 4 == 0);
  unrolled<kRows>([&](auto r) {
    float totals[kStreams];
    unrolled<kStreams / 4>([&](auto i) {
      constexpr int kFirst = 4 * decltype(i)::value;
      V::store_totals(sums[kFirst][r], sums[kFirst + 1][r], sums[kFirst + 2][r],
                      sums[kFirst + 3][r], totals + kFirst);
    });
    float* c = d.c + r * d.c_stride + n;
    unrolled<kStreams>([&](auto s) { c[s * apart] = totals[s]; });
  });
}

// As many columns as streams of equal length hold; returns their number. A core gets more out of
// the memory than from one stream (kernels/side_by_side.h) if each goes on for a while:
// neighbouring columns of 4 KB end before the hardware has caught up. Eight columns in each stream
// gave 60 instead of 48 GB/s on a Zen 4, with columns of 1 KB three times as much; on an Emerald
// Rapids up to 12 % more.
template <class V, int kRows>
inline int dot_all_streams(const DotArgs<typename V::Value>& d) {
  const int each = d.columns / V::kStreams;
  for (int n = 0; n < each; ++n) dot_streams<V, kRows, V::kStreams>(d, n, each);
  return each * V::kStreams;
}

// Columns [n, n + kColumns).
template <class V, int kRows, int kColumns>
inline __attribute__((always_inline)) void dot_columns(const DotArgs<typename V::Value>& d, int n,
                                                       Ahead& ahead) {
  using Sum = typename V::Sum;
  DotBlock<V, kColumns, kRows> block;
  const int64_t place = static_cast<int64_t>(n) * kRows * kDenseSumBytes;
  if (d.resume) {
    block.move_sums(d.sums + place, [](Sum& sum, const Sum* from) { sum = *from; });
  } else {
    block.clear();
  }
  block.run(d, d.w + n * d.w_stride, ahead);
  if (!d.last) {
    block.move_sums(d.sums + place, [](const Sum& sum, Sum* to) { *to = sum; });
    return;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    float* c = d.c + r * d.c_stride + n;
    if constexpr (kColumns == kColumnBlock) {
      V::store_totals(block.sums[0][r], block.sums[1][r], block.sums[2][r], block.sums[3][r], c);
    } else {
      *c = V::total(block.sums[0][r]);
    }
  }
}

template <class V, int kRows>
void dot_block(const DotArgs<typename V::Value>& d) {
  int n = 0;
  if constexpr (kRows <= kStreamRows && V::kStreams > 1) {
    if (d.cold) n = dot_all_streams<V, kRows>(d);
  }
  // After the streams few columns are left, at their ends, and in the cache.
  const int64_t next_bytes = n > 0 ? 0 : d.next_bytes;
  const int64_t turns = (d.columns - n) / kColumnBlock + (d.columns - n) % kColumnBlock;
  Ahead ahead(d.next, next_bytes, turns * (d.k / V::kWidth));
  for (; n + kColumnBlock <= d.columns; n += kColumnBlock) {
    dot_columns<V, kRows, kColumnBlock>(d, n, ahead);
  }
  for (; n < d.columns; ++n) dot_columns<V, kRows, 1>(d, n, ahead);
}

template <class V, int kRows>
inline void dot_rows(const DotArgs<typename V::Value>& d) {
  if (d.rows == kRows) {
    dot_block<V, kRows>(d);
  } else if constexpr (kRows > 1) {
    dot_rows<V, kRows - 1>(d);
  }
}

template <class V>
void dot(const DotArgs<typename V::Value>& d) {
  dot_rows<V, V::kBlockRows>(d);
}

// The expand and the rounding, V::kOutputs outputs at a time: V::expand adds the products of one
// rank pair, V::load_floats, V::add_floats and V::store_bf16 take how many of the outputs there
// are.
template <class V>
void finish(const DenseFinishArgs& f) {
  for (int r = 0; r < f.rows; ++r) {
    const float* c = f.c + r * f.c_stride;
    uint16_t* out = f.out + r * f.out_stride;
    const uint16_t* t = f.t + r * f.t_stride;
    for (int n = 0; n < f.columns; n += V::kOutputs) {
      const int count = f.columns - n < V::kOutputs ? f.columns - n : V::kOutputs;
      typename V::Outputs sum = V::load_floats(c + n, count);
      if (f.bias != nullptr) sum = V::add_floats(sum, V::load_floats(f.bias + n, count));
      const uint16_t* ranks = t;
      for (int i = 0; i < f.loras; ++i) {
        const uint16_t* b = f.lora_b[i].b + (f.first_output + n) * 2;
        for (int pair = 0; pair < f.lora_b[i].rank_pairs; ++pair, ranks += 2) {
          sum = V::expand(sum, b + pair * f.outputs * 2, ranks, count);
        }
      }
      V::store_bf16(sum, out + n, count);
    }
  }
}

}  // namespace
}  // namespace ktrt
