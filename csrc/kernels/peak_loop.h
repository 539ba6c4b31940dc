// A loop of multiply-adds in registers, as each ISA file has one.
#pragma once

namespace ktrt {

// One kind of multiply-add. All operands are 1, so that the result counts the operations.
struct PeakLoop {
  const char* name;         // "avx512_bf16"
  const char* instruction;  // "vdpbf16ps"
  const char* operands;     // "float32", "bf16" or "int8"
  long multiply_adds;       // of one iteration
  // The sum of all accumulators after `iterations`: iterations · multiply_adds, while float32
  // counts exactly (2^24 per accumulator).
  double (*run)(long iterations) noexcept;
};

}  // namespace ktrt
