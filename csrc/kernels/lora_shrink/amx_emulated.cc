// The AMX body on emulated tiles, for tests on machines without AMX.
#include "kernels/lora_shrink/amx_body.h"

namespace ktrt {

extern const ShrinkKernel lora_shrink_amx_emulated;
const ShrinkKernel lora_shrink_amx_emulated = {"amx_emulated", tile_shrink<EmulatedTiles>};

}  // namespace ktrt
