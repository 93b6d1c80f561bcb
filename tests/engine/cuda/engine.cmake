# The whole engine. cuda_plan_test needs no GPU.
latentd_library(latentd_cuda_engine_harness SRCS ${CMAKE_CURRENT_LIST_DIR}/engine_harness.cc
  DEPS latentd_engine_cuda latentd_cpu_harness GTest::gtest)
latentd_test(cuda_plan_test SRCS cuda_plan_test.cc DEPS latentd_engine_cuda)
latentd_test(cuda_engine_test SRCS cuda_engine_test.cc DEPS latentd_cuda_engine_harness latentd_device_test
  absl::strings nlohmann_json::nlohmann_json LABELS golden TIMEOUT 300)
latentd_test(cuda_golden_test SRCS cuda_golden_test.cc DEPS latentd_cuda_engine_harness latentd_device_test
  absl::strings nlohmann_json::nlohmann_json LABELS golden TIMEOUT 300)
latentd_test(cuda_lost_test SRCS cuda_lost_test.cc trap.cu DEPS latentd_cuda_engine_harness latentd_device_test)
