#include "engine/cpu/kernels_impl.h"
#include "engine/cpu/vec_portable.h"

namespace latentd {

const Kernels kPortableKernels = KernelsImpl<VecPortable>::Table("portable");

}  // namespace latentd
