#include "engine/cpu/kernels_impl.h"
#include "engine/cpu/vec_avx512.h"

namespace latentd {

const Kernels kAvx512Kernels = KernelsImpl<VecAvx512>::Table("avx512");

}  // namespace latentd
