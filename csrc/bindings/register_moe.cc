#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "bindings/owned.h"
#include "bindings/packed_views.h"
#include "bindings/register.h"
#include "bindings/tensor_arg.h"
#include "cpu/topology.h"
#include "engine/engine.h"
#include "moe/moe_layer.h"

namespace ktrt {

namespace py = pybind11;

namespace {

// Threads are spread over the nodes evenly, node after node; without nodes all CPUs are one part.
std::shared_ptr<Engine> make_engine(int num_threads, int max_qlen,
                                    std::optional<std::vector<std::vector<int>>> nodes,
                                    bool fixed_kernels) {
  KTRT_CHECK(num_threads >= 1, "num_threads is " << num_threads << ", expected at least 1");
  // sched_setaffinity(2) knows no larger numbers (CONFIG_NR_CPUS).
  constexpr int kMaxCpus = 8192;
  if (!nodes) nodes = {{read_topology(allowed_cpus()).cpu_ids()}};
  const int parts = static_cast<int>(nodes->size());
  KTRT_CHECK(
      parts >= 1 && parts <= num_threads,
      "nodes lists " << parts << " nodes, expected 1 to num_threads (" << num_threads << ")");
  std::vector<int> cpus;
  std::vector<int> home;
  for (int part = 0; part < parts; ++part) {
    const std::vector<int>& node = (*nodes)[static_cast<std::size_t>(part)];
    const auto share = [&](std::int64_t of) { return num_threads * of / parts; };
    const auto count = static_cast<std::ptrdiff_t>(share(part + 1) - share(part));
    KTRT_CHECK(node.size() >= static_cast<std::size_t>(count),
               count << " of " << num_threads << " threads fall on node " << part
                     << ", which has only " << node.size() << " CPUs");
    for (const int cpu : node) {
      KTRT_CHECK(cpu >= 0 && cpu < kMaxCpus,
                 "nodes names CPU " << cpu << ", expected 0 to " << kMaxCpus - 1);
    }
    cpus.insert(cpus.end(), node.begin(), node.begin() + count);
    home.insert(home.end(), static_cast<std::size_t>(count), part);
  }
  return make_owned<Engine>(cpus, home, max_qlen, fixed_kernels);
}

Projection parse_projection(const std::string& name) {
  for (const Projection projection : {Projection::kGate, Projection::kUp, Projection::kDown}) {
    if (name == name_of(projection)) return projection;
  }
  KTRT_CHECK(false, "projection is '" << name << "', expected 'gate', 'up' or 'down'");
  return Projection::kGate;
}

std::optional<TensorView> view_of(const std::optional<TensorArg>& arg) {
  return arg ? std::optional<TensorView>(arg->view()) : std::nullopt;
}

constexpr std::pair<const char*, ActivationKind> kActivationNames[] = {
    {"silu", ActivationKind::kSilu},          {"gelu", ActivationKind::kGelu},
    {"gelu_tanh", ActivationKind::kGeluTanh}, {"relu", ActivationKind::kRelu},
    {"relu2", ActivationKind::kRelu2},        {"softcap_silu", ActivationKind::kSoftcapSilu},
};

ActivationKind parse_activation(const std::string& name) {
  std::string known;
  for (const auto& [text, kind] : kActivationNames) {
    if (name == text) return kind;
    known += (known.empty() ? "'" : ", '") + std::string(text) + "'";
  }
  KTRT_CHECK(false, "activation is '" << name << "', expected one of " << known);
  return ActivationKind::kSilu;
}

std::shared_ptr<MoeLayer> make_layer(std::shared_ptr<Engine> engine, int num_experts, int top_k,
                                     int hidden_size, int intermediate_size,
                                     const std::string& weight_format, bool has_gate,
                                     const std::string& activation, float alpha, float gate_limit,
                                     float up_limit, float up_offset, int down_slices) {
  const MoeShape shape{num_experts, top_k, hidden_size, intermediate_size, has_gate};
  return make_owned<MoeLayer>(
      std::move(engine), shape, parse_format(weight_format),
      Activation{parse_activation(activation), alpha, gate_limit, up_limit, up_offset},
      down_slices);
}

// How the experts differ from down(silu(gate x) · up x), in words.
std::vector<std::string> unusual_form(const MoeLayer& layer) {
  std::vector<std::string> found;
  const Activation& activation = layer.activation();
  if (!layer.shape().has_gate) found.emplace_back("no gate");
  if (layer.experts().down_slices() > 1) found.emplace_back("down in slices of columns");
  if (layer.experts().has_biases()) found.emplace_back("biases");
  for (const auto& [name, kind] : kActivationNames) {
    if (kind == activation.kind && kind != ActivationKind::kSilu) {
      found.push_back("activation " + std::string(name));
    }
  }
  if (activation.alpha != 1.0f) found.emplace_back("a slope of the activation");
  if (activation.gate_limit != Activation::kNoLimit ||
      activation.up_limit != Activation::kNoLimit) {
    found.emplace_back("limits of gate or up");
  }
  if (activation.up_offset != 0.0f) found.emplace_back("an offset of up");
  return found;
}

// The arguments of the constructor.
py::dict activation_arguments(const MoeLayer& layer) {
  const Activation& activation = layer.activation();
  py::dict found;
  for (const auto& [name, kind] : kActivationNames) {
    if (kind == activation.kind) found["activation"] = name;
  }
  found["alpha"] = activation.alpha;
  found["gate_limit"] = activation.gate_limit;
  found["up_limit"] = activation.up_limit;
  found["up_offset"] = activation.up_offset;
  return found;
}

void load_expert(MoeLayer& layer, int expert, const py::object& gate, const py::object& up,
                 const py::object& down) {
  const auto g = optional_tensor(gate, "gate");
  const TensorArg u(up, "up");
  const TensorArg d(down, "down");
  const py::gil_scoped_release release;
  layer.experts().load_expert(expert, view_of(g), u.view(), d.view());
}

void set_biases(MoeLayer& layer, const py::object& gate, const py::object& up,
                const py::object& down) {
  const auto g = optional_tensor(gate, "gate");
  const auto u = optional_tensor(up, "up");
  const auto d = optional_tensor(down, "down");
  const py::gil_scoped_release release;
  layer.experts().set_biases(view_of(g), view_of(u), view_of(d));
}

void load_lora(MoeLayer& layer, int number, const py::object& gate_a, const py::object& gate_b,
               const py::object& up_a, const py::object& up_b, const py::object& down_a,
               const py::object& down_b) {
  const auto ga = optional_tensor(gate_a, "gate_a");
  const auto gb = optional_tensor(gate_b, "gate_b");
  const auto ua = optional_tensor(up_a, "up_a");
  const auto ub = optional_tensor(up_b, "up_b");
  const auto da = optional_tensor(down_a, "down_a");
  const auto db = optional_tensor(down_b, "down_b");
  const py::gil_scoped_release release;
  layer.load_lora(number, {view_of(ga), view_of(gb)}, {view_of(ua), view_of(ub)},
                  {view_of(da), view_of(db)});
}

void activate_loras(MoeLayer& layer, const std::vector<int>& ids,
                    const std::vector<float>& weights) {
  const py::gil_scoped_release release;
  layer.activate_loras(ids, weights);
}

void forward(MoeLayer& layer, const py::object& hidden_states, const py::object& expert_ids,
             const py::object& routing_weights, const py::object& out,
             const py::object& adapter_ids) {
  const TensorArg hidden(hidden_states, "hidden_states");
  const TensorArg ids(expert_ids, "expert_ids");
  const TensorArg weights(routing_weights, "routing_weights");
  const TensorArg result(out, "out");
  const auto adapters = optional_tensor(adapter_ids, "adapter_ids");
  const py::gil_scoped_release release;
  layer.forward(hidden.view(), ids.view(), weights.view(), result.view(), view_of(adapters));
}

// A forward between arrays that stay where they are: what DLPack costs, four calls of Python, comes
// once.
class BoundForward {
 public:
  BoundForward(std::shared_ptr<MoeLayer> layer, const py::object& hidden_states,
               const py::object& expert_ids, const py::object& routing_weights,
               const py::object& out, const py::object& adapter_ids)
      : layer_(std::move(layer)),
        hidden_(hidden_states, "hidden_states"),
        ids_(expert_ids, "expert_ids"),
        weights_(routing_weights, "routing_weights"),
        out_(out, "out"),
        adapters_(optional_tensor(adapter_ids, "adapter_ids")) {}

  void run() const {
    layer_->forward(hidden_.view(), ids_.view(), weights_.view(), out_.view(), view_of(adapters_));
  }

 private:
  const std::shared_ptr<MoeLayer> layer_;
  const TensorArg hidden_;
  const TensorArg ids_;
  const TensorArg weights_;
  const TensorArg out_;
  const std::optional<TensorArg> adapters_;
};

std::shared_ptr<BoundForward> bind(std::shared_ptr<MoeLayer> layer, const py::object& hidden_states,
                                   const py::object& expert_ids, const py::object& routing_weights,
                                   const py::object& out, const py::object& adapter_ids) {
  return make_owned<BoundForward>(std::move(layer), hidden_states, expert_ids, routing_weights, out,
                                  adapter_ids);
}

py::dict last_kernels(const MoeLayer& layer) {
  const KernelsUsed used = layer.last_kernels();
  py::dict names;
  if (used.gemm != nullptr) names["gemm"] = used.gemm;
  if (used.gemm_few_rows != nullptr) names["gemm_few_rows"] = used.gemm_few_rows;
  if (used.lora_shrink != nullptr) names["lora_shrink"] = used.lora_shrink;
  if (used.lora_shrink_few_rows != nullptr) {
    names["lora_shrink_few_rows"] = used.lora_shrink_few_rows;
  }
  if (used.elementwise != nullptr) names["elementwise"] = used.elementwise;
  return names;
}

py::bytes packed_codes(MoeLayer& layer, int expert, const std::string& projection) {
  const auto codes = layer.experts().packed_codes(expert, parse_projection(projection));
  return {reinterpret_cast<const char*>(codes.data()), codes.size()};
}

py::bytes packed_scales(MoeLayer& layer, int expert, const std::string& projection) {
  const auto scales = layer.experts().packed_scales(expert, parse_projection(projection));
  return {reinterpret_cast<const char*>(scales.data()), scales.size() * sizeof(float)};
}

void register_engine(py::module_& module) {
  py::class_<Engine, std::shared_ptr<Engine>>(module, "Engine")
      .def(py::init(&make_engine), py::kw_only(), py::arg("num_threads"),
           py::arg("max_qlen") = 1024, py::arg("nodes") = py::none(),
           py::arg("fixed_kernels") = false)
      .def_property_readonly("num_threads", &Engine::num_threads)
      .def_property_readonly("parts", &Engine::parts)
      .def_property_readonly("max_qlen", &Engine::max_qlen)
      .def_property_readonly("fixed_kernels", &Engine::fixed_kernels)
      .def_property_readonly("closed", &Engine::closed)
      .def_property_readonly("workspace_bytes", &Engine::workspace_bytes)
      .def("close", &Engine::close, py::call_guard<py::gil_scoped_release>());
  py::class_<ReadProbe, std::shared_ptr<ReadProbe>>(module, "ReadProbe")
      .def(py::init([](std::size_t bytes) { return make_owned<ReadProbe>(bytes); }),
           py::arg("nbytes"))
      .def_property_readonly("nbytes", &ReadProbe::bytes)
      .def(
          "seconds", [](const ReadProbe& probe, Engine& engine) { return engine.run_probe(probe); },
          py::arg("engine").none(false), py::call_guard<py::gil_scoped_release>());
}

void register_bound_forward(py::module_& module) {
  py::class_<BoundForward, std::shared_ptr<BoundForward>>(module, "BoundForward")
      .def("run", &BoundForward::run, py::call_guard<py::gil_scoped_release>());
}

void register_layer(py::module_& module) {
  py::class_<MoeLayer, std::shared_ptr<MoeLayer>> layer(module, "MoeLayer");
  layer
      .def(py::init(&make_layer), py::arg("engine").none(false), py::kw_only(),
           py::arg("num_experts"), py::arg("top_k"), py::arg("hidden_size"),
           py::arg("intermediate_size"), py::arg("weight_format"), py::arg("has_gate") = true,
           py::arg("activation") = "silu", py::arg("alpha") = 1.0f,
           py::arg("gate_limit") = Activation::kNoLimit, py::arg("up_limit") = Activation::kNoLimit,
           py::arg("up_offset") = 0.0f, py::arg("down_slices") = 1)
      .def_property_readonly("num_experts", [](const MoeLayer& l) { return l.shape().num_experts; })
      .def_property_readonly("top_k", [](const MoeLayer& l) { return l.shape().top_k; })
      .def_property_readonly("hidden_size", [](const MoeLayer& l) { return l.shape().hidden_size; })
      .def_property_readonly("intermediate_size",
                             [](const MoeLayer& l) { return l.shape().intermediate_size; })
      .def_property_readonly("weight_format",
                             [](const MoeLayer& l) { return std::string(name_of(l.format())); })
      .def_property_readonly("packed_bytes",
                             [](const MoeLayer& l) { return l.experts().packed_bytes(); })
      .def_property_readonly("has_gate", [](const MoeLayer& l) { return l.shape().has_gate; })
      .def_property_readonly("activation", &activation_arguments)
      .def_property_readonly("unusual_form", &unusual_form)
      .def("load_expert", &load_expert, py::arg("expert"), py::arg("gate"), py::arg("up"),
           py::arg("down"))
      .def("set_biases", &set_biases, py::kw_only(), py::arg("gate") = py::none(),
           py::arg("up") = py::none(), py::arg("down") = py::none())
      .def("load_lora", &load_lora, py::arg("number"), py::kw_only(),
           py::arg("gate_a") = py::none(), py::arg("gate_b") = py::none(),
           py::arg("up_a") = py::none(), py::arg("up_b") = py::none(),
           py::arg("down_a") = py::none(), py::arg("down_b") = py::none())
      .def("unload_lora", &MoeLayer::unload_lora, py::arg("number"),
           py::call_guard<py::gil_scoped_release>())
      .def("activate_loras", &activate_loras, py::arg("ids"), py::arg("weights"))
      .def_property_readonly("active_loras",
                             [](MoeLayer& l) {
                               return py::cast([&] {
                                 const py::gil_scoped_release release;
                                 return l.active_loras();
                               }());
                             })
      .def("forward", &forward, py::arg("hidden_states"), py::arg("expert_ids"),
           py::arg("routing_weights"), py::arg("out"), py::arg("adapter_ids") = py::none())
      .def("bind", &bind, py::arg("hidden_states"), py::arg("expert_ids"),
           py::arg("routing_weights"), py::arg("out"), py::arg("adapter_ids") = py::none())
      .def("last_kernels", &last_kernels)
      .def_property_readonly("last_experts", &MoeLayer::last_experts)
      .def("packed_codes", &packed_codes, py::arg("expert"), py::arg("projection"))
      .def("packed_scales", &packed_scales, py::arg("expert"), py::arg("projection"))
      .def("packed_parts", &packed_parts)
      .def("bias_views", &bias_views)
      .def("lora_view", &lora_view, py::arg("number"))
      .def_property_readonly("loras",
                             [](MoeLayer& l) {
                               return py::cast([&] {
                                 const py::gil_scoped_release release;
                                 return l.loras();
                               }());
                             })
      .def_property_readonly("lora_version", &MoeLayer::lora_version);
  register_packed(module, layer);
}

}  // namespace

void register_moe(py::module_& module) {
  register_engine(module);
  register_packed_views(module);
  register_bound_forward(module);
  register_layer(module);
}

}  // namespace ktrt
