#include "tests/engine/cuda/trap.h"

namespace latentd {
namespace {

__global__ void Trap() { asm volatile("trap;"); }

}  // namespace

void LoseTheGpu() { Trap<<<1, 1>>>(); }

}  // namespace latentd
