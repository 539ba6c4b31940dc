#include "kernels/lora_shrink/amx_body.h"

namespace ktrt {

extern const ShrinkKernel lora_shrink_amx;
const ShrinkKernel lora_shrink_amx = {"amx", tile_shrink<HardwareTiles>};

}  // namespace ktrt
