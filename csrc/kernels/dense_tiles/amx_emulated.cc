// The AMX body on emulated tiles, for tests on machines without AMX.
#include "kernels/dense_tiles/amx_body.h"

namespace ktrt {

extern const GemmKernel dense_tiles_amx_emulated;
const GemmKernel dense_tiles_amx_emulated = row_major_kernel<EmulatedTiles>("amx_emulated");

}  // namespace ktrt
