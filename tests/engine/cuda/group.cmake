# A rank of a group: the kernels of the exchange, and groups whose ranks are threads on one GPU.
latentd_test(exchange_test SRCS exchange_test.cc
  DEPS latentd_kernel_exchange latentd_kernel_gather latentd_device_test)
if(LATENTD_NCCL_INCLUDE)
  latentd_test(nccl_communicator_test SRCS nccl_communicator_test.cc
    DEPS latentd_nccl latentd_kernel_exchange latentd_device_test absl::status absl::time)  # a kernel: for cudart
endif()
latentd_library(latentd_cuda_group_harness SRCS ${CMAKE_CURRENT_LIST_DIR}/group_harness.cc
  DEPS latentd_cuda_engine_harness latentd_local_group)
latentd_test(cuda_group_test SRCS cuda_group_test.cc
  DEPS latentd_cuda_group_harness latentd_device_test latentd_nccl absl::strings nlohmann_json::nlohmann_json
  LABELS golden TIMEOUT 600)
latentd_benchmark(group_benchmark SRCS group_benchmark.cc
  DEPS latentd_cuda_group_harness latentd_kernel_exchange latentd_kernel_gather nlohmann_json::nlohmann_json GTest::gtest)
