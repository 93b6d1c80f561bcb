#ifndef LATENTD_ENGINE_COMM_LIBRARY_FUNCTION_H_
#define LATENTD_ENGINE_COMM_LIBRARY_FUNCTION_H_

#include <dlfcn.h>

namespace latentd {

// Finds a function of a library that dlopen() loaded. False when it has none of this name.
template <typename Function>
bool FindFunction(void* library, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  return *function != nullptr;
}

}  // namespace latentd

#endif  // LATENTD_ENGINE_COMM_LIBRARY_FUNCTION_H_
