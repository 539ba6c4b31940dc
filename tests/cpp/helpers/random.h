// Random test data, the same with every standard library.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <numeric>
#include <utility>
#include <vector>

namespace ktrt::testing {

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  // SplitMix64 (Steele, Lea, Flood 2014).
  std::uint64_t bits() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  // In [low, high).
  double uniform(double low, double high) {
    return low + (high - low) * static_cast<double>(bits() >> 11) * 0x1p-53;
  }

  // In [low, high].
  int integer(int low, int high) {
    const auto span = static_cast<std::uint64_t>(high - low) + 1;
    return low + static_cast<int>(bits() % span);
  }

  // Nearly normal, with mean 0 and deviation 1: the sum of four uniform values (tests draw tens of
  // millions).
  float normal() {
    const std::uint64_t four = bits();
    std::uint64_t sum = 0;
    for (int shift = 0; shift < 64; shift += 16) sum += (four >> shift) & 0xffff;
    const double centred = static_cast<double>(sum) * 0x1p-16 - 2.0 * (1.0 - 0x1p-16);
    return static_cast<float>(centred * std::numbers::sqrt3);
  }

  std::vector<float> normals(std::size_t count, float deviation = 1.0f) {
    std::vector<float> values(count);
    for (float& value : values) value = normal() * deviation;
    return values;
  }

  // 0 … count - 1 in random order.
  std::vector<int> permutation(int count) {
    std::vector<int> order(static_cast<std::size_t>(count));
    std::iota(order.begin(), order.end(), 0);
    for (int i = count - 1; i > 0; --i) {
      std::swap(order[static_cast<std::size_t>(i)], order[static_cast<std::size_t>(integer(0, i))]);
    }
    return order;
  }

 private:
  std::uint64_t state_;
};

}  // namespace ktrt::testing
