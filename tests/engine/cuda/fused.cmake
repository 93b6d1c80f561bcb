# The small kernels between the products.
latentd_test(norm_test SRCS norm_test.cc DEPS latentd_kernel_norm latentd_device_test TIMEOUT 300)
latentd_test(mla_projection_test SRCS mla_projection_test.cc
  DEPS latentd_kernel_mla_projection latentd_kernel_mla_latents latentd_device_test TIMEOUT 300)
latentd_benchmark(fused_benchmark SRCS fused_benchmark.cc
  DEPS latentd_kernel_norm latentd_kernel_mla_projection latentd_kernel_mla_latents latentd_device_test
       GTest::gtest)
