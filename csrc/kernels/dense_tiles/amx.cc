#include "kernels/dense_tiles/amx_body.h"

namespace ktrt {

extern const GemmKernel dense_tiles_amx;
const GemmKernel dense_tiles_amx = row_major_kernel<HardwareTiles>("amx");

}  // namespace ktrt
