#include "cpu/topology.h"

#include <sched.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string_view>
#include <system_error>
#include <tuple>

#include "base/check.h"

namespace ktrt {
namespace {

std::optional<int> parse_int(std::string_view text) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) return std::nullopt;
  return value;
}

// The kernel's list format, "0-3,8,10-11"; empty for an empty or malformed list.
std::vector<int> parse_cpu_list(std::string_view text) {
  std::vector<int> cpus;
  while (!text.empty()) {
    const std::string_view item = text.substr(0, text.find(','));
    text.remove_prefix(std::min(text.size(), item.size() + 1));
    const size_t dash = item.find('-');
    const auto first = parse_int(item.substr(0, dash));
    const auto last = dash == item.npos ? first : parse_int(item.substr(dash + 1));
    if (!first || !last) return {};
    for (int cpu = *first; cpu <= *last; ++cpu) cpus.push_back(cpu);
  }
  return cpus;
}

// The first line; empty if the file cannot be read.
std::string read_line(const std::filesystem::path& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

std::map<int, int> read_nodes(const std::filesystem::path& system) {
  std::map<int, int> node_of_cpu;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(system / "node", error)) {
    const std::string name = entry.path().filename();
    if (!name.starts_with("node")) continue;
    const auto node = parse_int(std::string_view(name).substr(4));
    if (!node) continue;
    for (const int cpu : parse_cpu_list(read_line(entry.path() / "cpulist"))) {
      node_of_cpu[cpu] = *node;
    }
  }
  return node_of_cpu;
}

// Core ids repeat between packages and dies, so a core is named by its smallest CPU.
int read_core(const std::filesystem::path& topology, int cpu) {
  for (const char* file : {"core_cpus_list", "thread_siblings_list"}) {
    const std::vector<int> siblings = parse_cpu_list(read_line(topology / file));
    if (!siblings.empty()) return *std::min_element(siblings.begin(), siblings.end());
  }
  return cpu;
}

void sort_for_placement(std::vector<Cpu>& cpus) {
  const auto compact = [](const Cpu& cpu) {
    return std::tuple(cpu.node, cpu.package, cpu.core, cpu.id);
  };
  std::sort(cpus.begin(), cpus.end(),
            [&](const Cpu& a, const Cpu& b) { return compact(a) < compact(b); });
  // Siblings are neighbours now: the n-th of each core goes into the n-th round.
  std::map<int, int> seen_of_core;
  std::map<int, int> round_of_cpu;
  for (const Cpu& cpu : cpus) round_of_cpu[cpu.id] = seen_of_core[cpu.core]++;
  std::stable_sort(cpus.begin(), cpus.end(), [&](const Cpu& a, const Cpu& b) {
    return round_of_cpu[a.id] < round_of_cpu[b.id];
  });
}

}  // namespace

int Topology::num_cores() const {
  std::set<int> cores;
  for (const Cpu& cpu : cpus) cores.insert(cpu.core);
  return static_cast<int>(cores.size());
}

std::vector<int> Topology::nodes() const {
  std::set<int> nodes;
  for (const Cpu& cpu : cpus) nodes.insert(cpu.node);
  return {nodes.begin(), nodes.end()};
}

std::vector<int> Topology::cpu_ids() const {
  std::vector<int> ids;
  for (const Cpu& cpu : cpus) ids.push_back(cpu.id);
  return ids;
}

std::vector<int> Topology::cpu_ids_of_node(int node) const {
  std::vector<int> ids;
  for (const Cpu& cpu : cpus) {
    if (cpu.node == node) ids.push_back(cpu.id);
  }
  return ids;
}

std::vector<int> allowed_cpus() {
  // The kernel refuses (EINVAL) a mask smaller than its own number of CPUs.
  for (int capacity = 1024; capacity <= 1 << 20; capacity *= 2) {
    const size_t bytes = CPU_ALLOC_SIZE(capacity);
    const auto release = [](cpu_set_t* set) { CPU_FREE(set); };
    const std::unique_ptr<cpu_set_t, decltype(release)> mask(CPU_ALLOC(capacity), release);
    if (sched_getaffinity(0, bytes, mask.get()) == 0) {
      std::vector<int> cpus;
      for (int cpu = 0; cpu < capacity; ++cpu) {
        if (CPU_ISSET_S(cpu, bytes, mask.get())) cpus.push_back(cpu);
      }
      return cpus;
    }
    if (errno != EINVAL) break;
  }
  throw std::system_error(errno, std::generic_category(), "sched_getaffinity");
}

Topology read_topology(const std::vector<int>& allowed, const std::string& sysfs_root) {
  const std::filesystem::path system = std::filesystem::path(sysfs_root) / "devices/system";
  const std::map<int, int> node_of_cpu = read_nodes(system);
  Topology topology;
  for (const int id : allowed) {
    const std::filesystem::path directory = system / "cpu" / ("cpu" + std::to_string(id));
    if (read_line(directory / "online") == "0") continue;
    Cpu cpu{.id = id, .core = read_core(directory / "topology", id)};
    const auto package = parse_int(read_line(directory / "topology/physical_package_id"));
    cpu.package = std::max(0, package.value_or(0));  // the kernel says -1 where it does not know
    const auto node = node_of_cpu.find(id);
    cpu.node = node == node_of_cpu.end() ? 0 : node->second;
    topology.cpus.push_back(cpu);
  }
  KTRT_CHECK(!topology.cpus.empty(),
             "none of the " << allowed.size() << " allowed CPUs is online under " << sysfs_root);
  sort_for_placement(topology.cpus);
  return topology;
}

}  // namespace ktrt
