# Loading weights. gpu_layout_test needs no GPU.
latentd_library(latentd_weights_reference
  SRCS ${CMAKE_CURRENT_LIST_DIR}/weights_reference.cc DEPS latentd_engine_cuda GTest::gtest)
latentd_test(gpu_layout_test SRCS gpu_layout_test.cc DEPS latentd_weights_reference)
latentd_test(gpu_weights_test SRCS gpu_weights_test.cc DEPS latentd_weights_reference latentd_device_test)
latentd_benchmark(gpu_load_benchmark SRCS gpu_load_benchmark.cc DEPS latentd_engine_cuda)
