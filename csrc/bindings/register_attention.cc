#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "attention/latent_attention.h"
#include "attention/token_attention.h"
#include "base/address_range.h"
#include "base/check.h"
#include "bindings/owned.h"
#include "bindings/register.h"
#include "bindings/tensor_arg.h"
#include "kernels/select.h"
#include "norm/rms_norm.h"

namespace ktrt {

namespace py = pybind11;

namespace {

template <class T>
T* address(std::uintptr_t value, const char* name) {
  KTRT_CHECK(value % sizeof(T) == 0,
             name << " is no multiple of " << sizeof(T) << ", expected an address of its numbers");
  return reinterpret_cast<T*>(value);  // NOLINT: Python's data_ptr()
}

HeadArray head_array(std::uintptr_t at, std::int64_t count, std::int64_t head_stride,
                     std::int64_t token_stride, bool float32, std::int64_t slot_stride) {
  KTRT_CHECK(count >= 0 && head_stride >= 0 && token_stride >= 0 && slot_stride >= 0,
             "count, head_stride, token_stride and slot_stride are "
                 << count << ", " << head_stride << ", " << token_stride << " and " << slot_stride
                 << ", expected none below 0");
  check_address_range("address", reinterpret_cast<const void*>(at), count,  // NOLINT
                      float32 ? sizeof(float) : sizeof(std::uint16_t));
  void* data = float32 ? static_cast<void*>(address<float>(at, "address"))
                       : static_cast<void*>(address<std::uint16_t>(at, "address"));
  return {data, count, head_stride, token_stride, float32, slot_stride};
}

SlotRows slot_rows(std::uintptr_t slots, std::uintptr_t lengths, std::int64_t rows,
                   std::int64_t slot_count, std::int64_t capacity, std::int64_t window) {
  const SlotRows made{address<std::int64_t>(slots, "slots"),
                      address<std::int64_t>(lengths, "lengths"),
                      rows,
                      slot_count,
                      capacity,
                      window};
  check_slot_rows(made);
  return made;
}

std::shared_ptr<TokenAttention> token_attention(std::shared_ptr<Engine> engine, std::int64_t heads,
                                                std::int64_t groups, std::int64_t key_size,
                                                std::int64_t value_size, float scaling,
                                                std::int64_t second_key_size, float softcap,
                                                const py::object& sinks) {
  const auto arg = optional_tensor(sinks, "sinks");
  return make_owned<TokenAttention>(
      std::move(engine),
      TokenAttention::Form{heads, groups, key_size, second_key_size, value_size, scaling, softcap},
      arg ? std::optional<TensorView>(arg->view()) : std::nullopt);
}

void attend(TokenAttention& attention, const HeadArray& query, const HeadArray* second_query,
            const HeadArray& keys, const HeadArray* second_keys, const HeadArray& values,
            std::int64_t start, std::int64_t end, const HeadArray& out, std::uintptr_t mask,
            std::int64_t mask_count, std::int64_t ring) {
  const TokenAttention::Arrays arrays{query,
                                      second_query != nullptr ? *second_query : HeadArray{},
                                      keys,
                                      second_keys != nullptr ? *second_keys : HeadArray{},
                                      values,
                                      out,
                                      address<float>(mask, "mask"),
                                      mask_count};
  const py::gil_scoped_release release;
  attention.forward(arrays, start, end, ring);
}

void attend_rows(TokenAttention& attention, const HeadArray& query, const HeadArray& keys,
                 const HeadArray& values, const HeadArray& out, const SlotRows& rows) {
  TokenAttention::Arrays arrays;
  arrays.query = query;
  arrays.keys = keys;
  arrays.values = values;
  arrays.out = out;
  const py::gil_scoped_release release;
  attention.forward_rows(arrays, rows);
}

void attend_prompt_of(TokenAttention& attention, const HeadArray& query, const HeadArray& keys,
                      const HeadArray& values, const HeadArray& out, std::int64_t start,
                      std::int64_t tokens, std::int64_t first, std::int64_t window) {
  const py::gil_scoped_release release;
  attention.forward_prompt({query, keys, values, out}, {start, tokens, first, window});
}

// Latent attention and the arrays that hold kv_b_proj's halves.
struct HeldLatentAttention {
  HeldLatentAttention(std::shared_ptr<Engine> engine, const py::object& key_array,
                      const py::object& value_array, std::int64_t heads, std::int64_t rope,
                      float scaling)
      : keys(key_array, "keys"),
        values(value_array, "values"),
        attention(std::move(engine), form_of(heads, rope, scaling), keys.view(), values.view()) {}

  LatentAttention::Form form_of(std::int64_t heads, std::int64_t rope, float scaling) const {
    keys.view().expect_shape({-1, -1});
    values.view().expect_shape({-1, -1});
    KTRT_CHECK(heads >= 1, "heads is " << heads << ", expected at least 1");
    const std::int64_t rank = values.view().shape[1];
    return {heads, keys.view().shape[1], rope, rank, values.view().shape[0] / heads, scaling};
  }

  const TensorArg keys, values;
  LatentAttention attention;
};

void load_latent_lora(HeldLatentAttention& held, int number, const py::object& a,
                      const py::object& b) {
  if (a.is_none() && b.is_none()) {
    const py::gil_scoped_release release;
    return held.attention.load_empty_lora(number);
  }
  const TensorArg lora_a(a, "a");
  const TensorArg lora_b(b, "b");
  const py::gil_scoped_release release;
  held.attention.load_lora(number, lora_a.view(), lora_b.view());
}

void activate_latent_loras(HeldLatentAttention& held, const std::vector<int>& ids,
                           const std::vector<float>& weights) {
  const py::gil_scoped_release release;
  held.attention.activate_loras(ids, weights);
}

void attend_to_latents(HeldLatentAttention& held, const HeadArray& query, const HeadArray& latents,
                       const HeadArray* positions, const HeadArray& out, std::int64_t tokens) {
  const LatentAttention::Arrays arrays{query, latents,
                                       positions != nullptr ? *positions : HeadArray{}, out};
  const py::gil_scoped_release release;
  held.attention.forward(arrays, tokens);
}

void attend_to_latent_rows(HeldLatentAttention& held, const HeadArray& query,
                           const HeadArray& latents, const HeadArray* positions,
                           const HeadArray& out, const SlotRows& rows, std::uintptr_t adapter_ids) {
  const LatentAttention::Arrays arrays{query, latents,
                                       positions != nullptr ? *positions : HeadArray{}, out};
  const AdapterIds adapters{address<std::int32_t>(adapter_ids, "adapter_ids"),
                            adapter_ids != 0 ? rows.rows : 0};
  const py::gil_scoped_release release;
  held.attention.forward_rows(arrays, rows, adapters);
}

// A norm and the array that holds its weight.
struct HeldNorm {
  HeldNorm(const py::object& array, float eps, bool rounds_twice, float offset,
           std::shared_ptr<Engine> engine)
      : weight(array, "weight"),
        table(active_kernels()),
        norm(*table.elementwise, weight.view(), eps, offset, rounds_twice, std::move(engine)) {}

  const TensorArg weight;
  const KernelTable table;
  const RmsNorm norm;
};

// Holds the GIL for a few rows, which take less time than to let it go.
void norm_rows(const HeldNorm& held, std::uintptr_t x, std::int64_t x_count, std::int64_t rows,
               std::int64_t row_stride, std::uintptr_t out, std::int64_t out_count) {
  auto* const in = address<std::uint16_t>(x, "x");
  auto* const result = address<std::uint16_t>(out, "out");
  if (!held.norm.shares(rows)) {
    held.norm.forward(in, x_count, rows, row_stride, result, out_count);
    return;
  }
  const py::gil_scoped_release release;
  held.norm.forward(in, x_count, rows, row_stride, result, out_count);
}

}  // namespace

void register_attention(py::module_& module) {
  py::class_<HeadArray>(module, "HeadArray")
      .def(py::init(&head_array), py::arg("address"), py::arg("count"), py::arg("head_stride"),
           py::arg("token_stride") = 0, py::arg("float32") = false, py::arg("slot_stride") = 0);
  py::class_<SlotRows>(module, "SlotRows")
      .def(py::init(&slot_rows), py::arg("slots"), py::arg("lengths"), py::arg("rows"),
           py::arg("slot_count"), py::arg("capacity"), py::arg("window") = 0);
  py::class_<TokenAttention, std::shared_ptr<TokenAttention>>(module, "TokenAttention")
      .def(py::init(&token_attention), py::arg("engine").none(false), py::kw_only(),
           py::arg("heads"), py::arg("groups"), py::arg("key_size"), py::arg("value_size"),
           py::arg("scaling"), py::arg("second_key_size") = 0, py::arg("softcap") = 0.0f,
           py::arg("sinks") = py::none())
      .def("forward", &attend, py::arg("query"), py::arg("second_query").none(true),
           py::arg("keys"), py::arg("second_keys").none(true), py::arg("values"), py::arg("start"),
           py::arg("end"), py::arg("out"), py::arg("mask") = 0, py::arg("mask_count") = 0,
           py::arg("ring") = 0)
      .def("forward_rows", &attend_rows, py::arg("query"), py::arg("keys"), py::arg("values"),
           py::arg("out"), py::arg("rows"))
      .def_property_readonly(
          "takes_prompts",
          [](const TokenAttention& attention) { return attention.takes_prompts(); })
      .def("forward_prompt", &attend_prompt_of, py::arg("query"), py::arg("keys"),
           py::arg("values"), py::arg("out"), py::kw_only(), py::arg("start"), py::arg("tokens"),
           py::arg("first") = 0, py::arg("window") = 0);
  py::class_<HeldLatentAttention, std::shared_ptr<HeldLatentAttention>>(module, "LatentAttention")
      .def(py::init([](std::shared_ptr<Engine> engine, const py::object& keys,
                       const py::object& values, std::int64_t heads, std::int64_t rope,
                       float scaling) {
             return make_owned<HeldLatentAttention>(std::move(engine), keys, values, heads, rope,
                                                    scaling);
           }),
           py::arg("engine").none(false), py::arg("keys"), py::arg("values"), py::kw_only(),
           py::arg("heads"), py::arg("rope"), py::arg("scaling"))
      .def_property_readonly_static(
          "max_rank", [](const py::object&) { return int{LatentAttention::kMaxRank}; })
      .def("load_lora", &load_latent_lora, py::arg("number"), py::arg("a") = py::none(),
           py::arg("b") = py::none())
      .def(
          "unload_lora",
          [](HeldLatentAttention& held, int number) { held.attention.unload_lora(number); },
          py::arg("number"), py::call_guard<py::gil_scoped_release>())
      .def("activate_loras", &activate_latent_loras, py::arg("ids"), py::arg("weights"))
      .def_property_readonly(
          "lora_bytes", [](const HeldLatentAttention& held) { return held.attention.lora_bytes(); })
      .def("forward", &attend_to_latents, py::arg("query"), py::arg("latents"),
           py::arg("positions").none(true), py::arg("out"), py::arg("tokens"))
      .def("forward_rows", &attend_to_latent_rows, py::arg("query"), py::arg("latents"),
           py::arg("positions").none(true), py::arg("out"), py::arg("rows"),
           py::arg("adapter_ids") = 0);
  py::class_<HeldNorm>(module, "RmsNorm")
      .def(py::init<const py::object&, float, bool, float, std::shared_ptr<Engine>>(),
           py::arg("weight"), py::arg("eps"), py::kw_only(), py::arg("rounds_twice"),
           py::arg("offset") = 0.0f, py::arg("engine") = py::none())
      .def_property_readonly("size", [](const HeldNorm& held) { return held.norm.size(); })
      .def("forward", &norm_rows, py::arg("x"), py::arg("x_count"), py::arg("rows"),
           py::arg("row_stride"), py::arg("out"), py::arg("out_count"));
}

}  // namespace ktrt
