#include "layout/expert_shape.h"

namespace ktrt {

const char* name_of(Projection projection) {
  switch (projection) {
    case Projection::kGate:
      return "gate";
    case Projection::kUp:
      return "up";
    case Projection::kDown:
      return "down";
  }
  return "?";
}

}  // namespace ktrt
