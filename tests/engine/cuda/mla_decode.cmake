# Absorbed attention. mla_plan_test needs no GPU.
set(mla_plan ${CMAKE_SOURCE_DIR}/engine/cuda/kernels/mla_plan.cc)
latentd_test(mla_plan_test SRCS mla_plan_test.cc ${mla_plan} DEPS latentd_cuda_headers absl::span LABELS property)
latentd_test(mla_decode_test SRCS mla_decode_test.cu ${mla_plan} DEPS latentd_kernel_mla_decode latentd_device_test)
latentd_benchmark(mla_decode_benchmark SRCS mla_decode_benchmark.cu ${mla_plan}
  DEPS latentd_kernel_mla_decode latentd_device_test GTest::gtest)
