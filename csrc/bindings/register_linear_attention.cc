#include <cstdint>
#include <memory>
#include <utility>

#include "base/check.h"
#include "bindings/owned.h"
#include "bindings/register.h"
#include "linear_attention/linear_attention.h"
#include "linear_attention/selective_scan.h"
#include "linear_attention/short_conv.h"

namespace ktrt {

namespace py = pybind11;

namespace {

TokenArray token_array(std::uintptr_t at, std::int64_t count, std::int64_t sequence_stride,
                       std::int64_t token_stride, std::int64_t head_stride, bool float32) {
  const std::size_t size = float32 ? sizeof(float) : sizeof(std::uint16_t);
  KTRT_CHECK(at % size == 0,
             "address is no multiple of " << size << ", expected an address of its numbers");
  void* data = reinterpret_cast<void*>(at);  // NOLINT: Python's data_ptr()
  return {data, count, sequence_stride, token_stride, head_stride, float32};
}

StateArray state_array(std::uintptr_t at, std::int64_t count, std::int64_t stride) {
  KTRT_CHECK(at % sizeof(float) == 0, "state is no multiple of 4, expected an address of floats");
  return {reinterpret_cast<float*>(at), count, stride};  // NOLINT: Python's data_ptr()
}

TokenArray or_none(const TokenArray* array) { return array == nullptr ? TokenArray{} : *array; }

void register_recurrence(py::module_& module) {
  py::class_<LinearAttention, std::shared_ptr<LinearAttention>>(module, "LinearAttention")
      .def(py::init([](std::shared_ptr<Engine> engine, std::int64_t heads, std::int64_t key_heads,
                       std::int64_t key_size, std::int64_t value_size, float scaling,
                       bool subtracts, bool unit_keys, bool decay_per_key, bool transposed_state) {
             return make_owned<LinearAttention>(
                 std::move(engine),
                 LinearAttention::Form{heads, key_heads, key_size, value_size, scaling, subtracts,
                                       unit_keys, decay_per_key, transposed_state});
           }),
           py::arg("engine").none(false), py::kw_only(), py::arg("heads"), py::arg("key_heads"),
           py::arg("key_size"), py::arg("value_size"), py::arg("scaling"), py::arg("subtracts"),
           py::arg("unit_keys"), py::arg("decay_per_key"), py::arg("transposed_state"))
      .def(
          "forward",
          [](LinearAttention& attention, const TokenArray& query, const TokenArray& key,
             const TokenArray& value, const TokenArray& decay, const TokenArray* beta,
             std::uintptr_t state, std::int64_t state_count, std::int64_t state_stride,
             const TokenArray& out, std::int64_t sequences, std::int64_t tokens) {
            const LinearAttention::Arrays arrays{query,
                                                 key,
                                                 value,
                                                 decay,
                                                 or_none(beta),
                                                 out,
                                                 state_array(state, state_count, state_stride)};
            const py::gil_scoped_release release;
            attention.forward(arrays, sequences, tokens);
          },
          py::arg("query"), py::arg("key"), py::arg("value"), py::arg("decay"),
          py::arg("beta").none(true), py::arg("state"), py::arg("state_count"),
          py::arg("state_stride"), py::arg("out"), py::arg("sequences"), py::arg("tokens"));
}

void register_conv(py::module_& module) {
  py::class_<ShortConv, std::shared_ptr<ShortConv>>(module, "ShortConv")
      .def(py::init([](std::shared_ptr<Engine> engine, std::int64_t channels, std::int64_t taps,
                       bool silu) {
             return make_owned<ShortConv>(std::move(engine), ShortConv::Form{channels, taps, silu});
           }),
           py::arg("engine").none(false), py::kw_only(), py::arg("channels"), py::arg("taps"),
           py::arg("silu"))
      .def(
          "forward",
          [](ShortConv& conv, const TokenArray& x, const TokenArray& weight, const TokenArray* bias,
             const TokenArray* state, std::int64_t state_tokens, const TokenArray& out,
             std::int64_t sequences, std::int64_t tokens) {
            const ShortConv::Arrays arrays{x,           out, weight, or_none(bias), or_none(state),
                                           state_tokens};
            const py::gil_scoped_release release;
            conv.forward(arrays, sequences, tokens);
          },
          py::arg("x"), py::arg("weight"), py::arg("bias").none(true), py::arg("state").none(true),
          py::arg("state_tokens"), py::arg("out"), py::arg("sequences"), py::arg("tokens"));
}

void register_scan(py::module_& module) {
  py::class_<SelectiveScan, std::shared_ptr<SelectiveScan>>(module, "SelectiveScan")
      .def(py::init([](std::shared_ptr<Engine> engine, std::int64_t channels, std::int64_t size) {
             return make_owned<SelectiveScan>(std::move(engine), channels, size);
           }),
           py::arg("engine").none(false), py::kw_only(), py::arg("channels"), py::arg("size"))
      .def(
          "forward",
          [](SelectiveScan& scan, const TokenArray& x, const TokenArray& dt, const TokenArray& a,
             const TokenArray& b, const TokenArray& c, std::uintptr_t state,
             std::int64_t state_count, std::int64_t state_stride, const TokenArray& out,
             std::int64_t sequences, std::int64_t tokens) {
            const SelectiveScan::Arrays arrays{
                x, dt, out, b, c, a, state_array(state, state_count, state_stride)};
            const py::gil_scoped_release release;
            scan.forward(arrays, sequences, tokens);
          },
          py::arg("x"), py::arg("dt"), py::arg("a"), py::arg("b"), py::arg("c"), py::arg("state"),
          py::arg("state_count"), py::arg("state_stride"), py::arg("out"), py::arg("sequences"),
          py::arg("tokens"));
}

}  // namespace

void register_linear_attention(py::module_& module) {
  py::class_<TokenArray>(module, "TokenArray")
      .def(py::init(&token_array), py::arg("address"), py::arg("count"), py::arg("sequence_stride"),
           py::arg("token_stride"), py::arg("head_stride") = 0, py::arg("float32") = false);
  register_recurrence(module);
  register_conv(module);
  register_scan(module);
}

}  // namespace ktrt
