#include "engine/cpu/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace latentd {
namespace {

#if defined(__x86_64__)
// A process must ask Linux for the 8 KB of AMX tile state before its first tile instruction.
bool AmxPermitted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kArchReqXcompPerm = 0x1023;
  constexpr long kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
#else
  return false;
#endif
}

// CPUID leaf 7.0: EDX bit 22 is AMX-BF16, bit 24 AMX-TILE; leaf 7.1: EAX bit 5 is AVX512-BF16. Not
// every compiler's __builtin_cpu_supports knows their names.
bool CpuHasAmx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  const bool amx = (edx >> 22 & 1) != 0 && (edx >> 24 & 1) != 0;
  return amx && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 5 & 1) != 0;
}
#endif

}  // namespace

std::vector<const Kernels*> SupportedKernels() {
  std::vector<const Kernels*> supported;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && CpuHasAmx() && AmxPermitted()) supported.push_back(&kAmxKernels);
  if (avx512) supported.push_back(&kAvx512Kernels);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    supported.push_back(&kAvx2Kernels);
  }
#endif
  supported.push_back(&kPortableKernels);
  return supported;
}

}  // namespace latentd
