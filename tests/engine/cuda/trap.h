#ifndef LATENTD_TESTS_ENGINE_CUDA_TRAP_H_
#define LATENTD_TESTS_ENGINE_CUDA_TRAP_H_

namespace latentd {

// Launches a kernel that fails: from then on CUDA refuses everything in this process.
void LoseTheGpu();

}  // namespace latentd

#endif  // LATENTD_TESTS_ENGINE_CUDA_TRAP_H_
