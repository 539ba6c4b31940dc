// Sizes of one layer's routed experts, and the names of an expert's matrices.
#pragma once

namespace ktrt {

struct MoeShape {
  int num_experts = 0;
  int top_k = 0;  // slots per token, at most
  int hidden_size = 0;
  int intermediate_size = 0;
  bool has_gate = true;  // else an expert is down(f(up x))
};

enum class Projection { kGate = 0, kUp = 1, kDown = 2 };
inline constexpr int kProjections = 3;

const char* name_of(Projection projection);

}  // namespace ktrt
