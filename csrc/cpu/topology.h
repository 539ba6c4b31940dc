// Which CPUs this process may use, and how they share cores, packages and NUMA nodes.
#pragma once

#include <string>
#include <vector>

namespace ktrt {

// One hardware thread.
struct Cpu {
  int id = 0;
  int core = 0;     // the smallest CPU id of its physical core
  int package = 0;  // socket
  int node = 0;     // NUMA node
};

struct Topology {
  // In the order in which threads should be placed: one hardware thread of each core, cores of one
  // node and package next to each other, then the second hardware threads, and so on. This is what
  // KMP_AFFINITY=granularity=fine,compact,1,0 asks of OpenMP.
  std::vector<Cpu> cpus;

  int num_cores() const;
  std::vector<int> nodes() const;  // ascending; only nodes that have CPUs here

  std::vector<int> cpu_ids() const;
  std::vector<int> cpu_ids_of_node(int node) const;
};

// The CPUs in the affinity mask of the calling thread, which cgroup cpusets and taskset restrict.
std::vector<int> allowed_cpus();

// Reads `sysfs_root`/devices/system for the `allowed` CPUs. CPUs marked offline are left out. Where
// a file is missing (containers hide some), a CPU counts as a separate core in package 0 and node
// 0. Throws std::invalid_argument if no CPU is left.
Topology read_topology(const std::vector<int>& allowed, const std::string& sysfs_root = "/sys");

}  // namespace ktrt
