#include "cpu/topology.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include <sched.h>

namespace ktrt {
namespace {

namespace fs = std::filesystem;

// A made-up /sys in a temporary folder.
class TopologyTest : public ::testing::Test {
 protected:
  void SetUp() override {
    root_ = fs::temp_directory_path() / ("ktrt_topology_" + std::to_string(getpid()));
    fs::create_directories(root_);
  }
  void TearDown() override { fs::remove_all(root_); }

  void write(const std::string& path, const std::string& text) {
    const fs::path file = root_ / "devices/system" / path;
    fs::create_directories(file.parent_path());
    std::ofstream(file) << text << '\n';
  }

  void add_cpu(int id, int package, const std::string& siblings) {
    const std::string directory = "cpu/cpu" + std::to_string(id) + "/";
    write(directory + "topology/physical_package_id", std::to_string(package));
    write(directory + "topology/core_cpus_list", siblings);
    write(directory + "online", "1");
  }

  // Two packages of two cores of two hardware threads, numbered as Linux does on most Xeons: first
  // threads 0-3 (package 0: 0, 1), second threads 4-7.
  void add_two_packages() {
    for (int id = 0; id < 8; ++id) {
      const int core = id % 4;
      add_cpu(id, core / 2, std::to_string(core) + "," + std::to_string(core + 4));
    }
    write("node/node0/cpulist", "0-1,4-5");
    write("node/node1/cpulist", "2-3,6-7");
    write("node/possible", "0-1");
  }

  Topology read(const std::vector<int>& allowed) const { return read_topology(allowed, root_); }

  fs::path root_;
};

std::vector<int> range(int count) {
  std::vector<int> ids(static_cast<size_t>(count));
  std::iota(ids.begin(), ids.end(), 0);
  return ids;
}

TEST_F(TopologyTest, OneThreadPerCoreFirstThenSiblings) {
  add_two_packages();
  const Topology topology = read({7, 6, 5, 4, 3, 2, 1, 0});
  EXPECT_EQ(topology.cpu_ids(), range(8));
  EXPECT_EQ(topology.num_cores(), 4);
  EXPECT_EQ(topology.nodes(), (std::vector<int>{0, 1}));
  EXPECT_EQ(topology.cpu_ids_of_node(0), (std::vector<int>{0, 1, 4, 5}));
  EXPECT_EQ(topology.cpu_ids_of_node(1), (std::vector<int>{2, 3, 6, 7}));
  EXPECT_EQ(topology.cpus[6].core, 2);
  EXPECT_EQ(topology.cpus[6].package, 1);
}

TEST_F(TopologyTest, SiblingsNumberedNextToEachOther) {
  for (int id = 0; id < 6; ++id) {
    add_cpu(id, 0, std::to_string(id / 2 * 2) + "-" + std::to_string(id / 2 * 2 + 1));
  }
  EXPECT_EQ(read(range(6)).cpu_ids(), (std::vector<int>{0, 2, 4, 1, 3, 5}));
}

TEST_F(TopologyTest, CoresOfAPackageStayTogetherWhenNumbersAlternate) {
  for (int id = 0; id < 4; ++id) add_cpu(id, id % 2, std::to_string(id));
  EXPECT_EQ(read(range(4)).cpu_ids(), (std::vector<int>{0, 2, 1, 3}));
}

TEST_F(TopologyTest, OnlyAllowedCpusCount) {
  add_two_packages();
  const Topology topology = read({2, 6, 7});
  EXPECT_EQ(topology.cpu_ids(), (std::vector<int>{2, 7, 6}));
  EXPECT_EQ(topology.num_cores(), 2);
  EXPECT_EQ(topology.nodes(), (std::vector<int>{1}));
  EXPECT_TRUE(topology.cpu_ids_of_node(0).empty());
}

TEST_F(TopologyTest, OfflineCpusAreLeftOut) {
  add_two_packages();
  write("cpu/cpu1/online", "0");
  write("cpu/cpu5/online", "0");
  const Topology topology = read(range(8));
  EXPECT_EQ(topology.cpu_ids(), (std::vector<int>{0, 2, 3, 4, 6, 7}));
  EXPECT_EQ(topology.num_cores(), 3);
  EXPECT_THROW(read({1, 5}), std::invalid_argument);
}

TEST_F(TopologyTest, OldKernelsNameTheFileOtherwise) {
  for (int id = 0; id < 4; ++id) {
    write("cpu/cpu" + std::to_string(id) + "/topology/thread_siblings_list",
          std::to_string(id % 2) + "," + std::to_string(id % 2 + 2));
  }
  EXPECT_EQ(read(range(4)).num_cores(), 2);
}

TEST_F(TopologyTest, WithoutFilesEveryCpuIsACore) {
  const Topology topology = read({3, 1, 2});
  EXPECT_EQ(topology.cpu_ids(), (std::vector<int>{1, 2, 3}));
  EXPECT_EQ(topology.num_cores(), 3);
  EXPECT_EQ(topology.nodes(), (std::vector<int>{0}));
}

TEST_F(TopologyTest, MalformedFilesCountAsMissing) {
  add_two_packages();
  write("cpu/cpu0/topology/core_cpus_list", "0-x");
  write("cpu/cpu1/topology/physical_package_id", "-1");
  write("node/node1/cpulist", "");
  const Topology topology = read(range(4));
  EXPECT_EQ(topology.num_cores(), 4);
  EXPECT_EQ(topology.cpus[1].package, 0);
  EXPECT_EQ(topology.nodes(), (std::vector<int>{0}));
}

TEST_F(TopologyTest, NoCpuIsAnError) { EXPECT_THROW(read({}), std::invalid_argument); }

TEST(AllowedCpus, FollowTheAffinityMask) {
  const std::vector<int> before = allowed_cpus();
  ASSERT_FALSE(before.empty());
  EXPECT_EQ(read_topology(before).cpus.size(), before.size());
  std::thread([&] {
    cpu_set_t mask;
    CPU_ZERO(&mask);
    CPU_SET(before.back(), &mask);
    ASSERT_EQ(sched_setaffinity(0, sizeof mask, &mask), 0);
    EXPECT_EQ(allowed_cpus(), std::vector<int>{before.back()});
  }).join();
  EXPECT_EQ(allowed_cpus(), before);
}

}  // namespace
}  // namespace ktrt
