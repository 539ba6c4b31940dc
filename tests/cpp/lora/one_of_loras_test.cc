#include "lora/one_of_loras.h"

#include <gtest/gtest.h>

#include <limits>
#include <stdexcept>
#include <string>

#include "helpers/loras.h"

namespace ktrt {
namespace {

// OneOfLoras with the names that operators give its calls.
struct Holder {
  OneOfLoras<std::string> loras;
  void load(int id, const char* name) { loras.put(id, std::make_shared<const std::string>(name)); }
  void activate_loras(std::span<const int> ids, std::span<const float> weights) {
    loras.activate(ids, weights);
  }
  std::string active() const { return loras.active() == nullptr ? "none" : *loras.active(); }
};

TEST(OneOfLoras, OneActsOrNone) {
  Holder holder;
  EXPECT_EQ(holder.active(), "none");
  holder.load(3, "three");
  holder.load(0, "zero");
  EXPECT_EQ(holder.active(), "none") << "loading activates nothing";
  testing::apply_lora(holder, 3);
  EXPECT_EQ(holder.active(), "three");
  holder.load(3, "another");
  EXPECT_EQ(holder.active(), "another");
  testing::apply_lora(holder, 0);
  holder.loras.remove(3);
  EXPECT_EQ(holder.active(), "zero");
  testing::apply_no_lora(holder);
  EXPECT_EQ(holder.active(), "none");
  holder.loras.remove(0);
}

TEST(OneOfLoras, RefusesWhatItCannotApply) {
  Holder holder;
  holder.load(1, "one");
  holder.load(2, "two");
  testing::apply_lora(holder, 1);
  EXPECT_THROW(holder.load(-1, "below"), std::invalid_argument);
  EXPECT_THROW(holder.loras.remove(1), std::invalid_argument) << "it is active";
  EXPECT_THROW(holder.loras.remove(7), std::invalid_argument);
  EXPECT_THROW(testing::apply_lora(holder, 7), std::invalid_argument);
  const auto activate = [&](std::vector<int> ids, std::vector<float> weights) {
    holder.activate_loras(ids, weights);
  };
  EXPECT_THROW(activate({1, 2}, {1.0f, 1.0f}), std::invalid_argument);
  EXPECT_THROW(activate({2}, {0.5f}), std::invalid_argument);
  EXPECT_THROW(activate({2}, {std::numeric_limits<float>::quiet_NaN()}), std::invalid_argument);
  EXPECT_THROW(activate({2}, {}), std::invalid_argument);
  EXPECT_EQ(holder.active(), "one");
}

}  // namespace
}  // namespace ktrt
