# The CUDA compiler and what the CUDA engine is built with: a local toolkit (nvcc in PATH or /usr/local/cuda), else the
# Python wheels that `scripts/setup --cuda` puts into LATENTD_PYTHON_ENV. Sets LATENTD_HAVE_CUDA. At run time the program
# needs the driver, cuBLAS and, in a group, NCCL, and only when the CUDA engine is asked for: it loads them by name.

set(LATENTD_HAVE_CUDA OFF)
if(NOT LATENTD_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "LATENTD_CUDA is '${LATENTD_CUDA}'; known are: AUTO, ON, OFF")
endif()
# The host's sanitizers say nothing of kernels, and would only slow the build: compute-sanitizer is for those.
if(LATENTD_CUDA STREQUAL "OFF" OR (LATENTD_CUDA STREQUAL "AUTO" AND (LATENTD_SANITIZE OR LATENTD_FUZZ)))
  return()
endif()

file(GLOB latentd_wheels "${LATENTD_PYTHON_ENV}/lib/python3*/site-packages")
find_program(LATENTD_NVCC nvcc PATHS /usr/local/cuda/bin ${latentd_wheels}/nvidia/cu13/bin)
find_path(LATENTD_FLASHINFER flashinfer/attention/mla_hopper.cuh
  PATHS ${latentd_wheels}/flashinfer/data/include NO_DEFAULT_PATH)
if(NOT LATENTD_NVCC OR NOT LATENTD_FLASHINFER)
  if(LATENTD_CUDA STREQUAL "ON")
    message(FATAL_ERROR "LATENTD_CUDA=ON: nvcc is '${LATENTD_NVCC}', FlashInfer's headers are '${LATENTD_FLASHINFER}'; "
                        "run scripts/setup --cuda")
  endif()
  message(STATUS "CUDA engine: not built (no CUDA compiler, or no FlashInfer headers: scripts/setup --cuda)")
  return()
endif()

set(CMAKE_CUDA_COMPILER ${LATENTD_NVCC})
set(CMAKE_CUDA_ARCHITECTURES 90a-real)  # Hopper's own instructions; no JIT at run time
set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -lineinfo")
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
if(CCACHE)
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CMAKE_CXX_COMPILER_LAUNCHER})
endif()
enable_language(CUDA)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 knows of no C++20 in nvcc 13
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
endif()
get_filename_component(latentd_cuda_bin ${LATENTD_NVCC} REALPATH)
get_filename_component(latentd_cuda_root ${latentd_cuda_bin}/../.. ABSOLUTE)
set(LATENTD_CUDA_ROOT ${latentd_cuda_root})
find_path(LATENTD_CUBLAS_INCLUDE cublasLt.h PATHS ${LATENTD_CUDA_ROOT}/include REQUIRED)
# The exchange between GPUs; without the header the program has a model on one GPU alone.
find_path(LATENTD_NCCL_INCLUDE nccl.h PATHS ${LATENTD_CUDA_ROOT}/include ${latentd_wheels}/nvidia/nccl/include)

# Host code that calls the runtime; its kernels' headers.
add_library(latentd_cuda_headers INTERFACE)
target_include_directories(latentd_cuda_headers SYSTEM INTERFACE
  ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES} ${LATENTD_CUBLAS_INCLUDE})

# FlashInfer's kernel templates with the CUTLASS and CCCL of the same wheel, whose CCCL is newer than the toolkit's and
# has to come first: not SYSTEM, or the toolkit's would.
get_filename_component(latentd_flashinfer_data ${LATENTD_FLASHINFER} DIRECTORY)
add_library(latentd_flashinfer INTERFACE)
target_include_directories(latentd_flashinfer INTERFACE
  ${latentd_flashinfer_data}/cccl/libcudacxx/include ${latentd_flashinfer_data}/cccl/cub
  ${latentd_flashinfer_data}/cccl/thrust ${latentd_flashinfer_data}/include ${latentd_flashinfer_data}/csrc
  ${latentd_flashinfer_data}/cutlass/include ${latentd_flashinfer_data}/cutlass/tools/util/include
  ${latentd_flashinfer_data}/csrc/nv_internal ${latentd_flashinfer_data}/csrc/nv_internal/include
  ${latentd_flashinfer_data}/spdlog/include)

set(LATENTD_HAVE_CUDA ON)
message(STATUS "CUDA engine: ${LATENTD_NVCC}")
