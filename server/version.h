#ifndef LATENTD_SERVER_VERSION_H_
#define LATENTD_SERVER_VERSION_H_

namespace latentd {

inline constexpr char kVersion[] = LATENTD_VERSION;  // of the CMake project

}  // namespace latentd

#endif  // LATENTD_SERVER_VERSION_H_
