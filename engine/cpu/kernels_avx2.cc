#include "engine/cpu/kernels_impl.h"
#include "engine/cpu/vec_avx2.h"

namespace latentd {

const Kernels kAvx2Kernels = KernelsImpl<VecAvx2>::Table("avx2");

}  // namespace latentd
