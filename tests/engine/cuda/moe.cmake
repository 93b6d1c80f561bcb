# Routing, the bf16 products of the experts, the draw.
latentd_test(moe_test SRCS moe_test.cc
  DEPS latentd_kernel_router latentd_kernel_router_logits latentd_kernel_gather latentd_engine_cpu latentd_device_test TIMEOUT 300)
latentd_test(bf16_gemm_test SRCS bf16_gemm_test.cc DEPS latentd_kernel_bf16_gemm latentd_device_test TIMEOUT 300)
latentd_test(gpu_sampler_test SRCS gpu_sampler_test.cc
  DEPS latentd_kernel_sampler latentd_engine_cpu latentd_sampling latentd_device_test TIMEOUT 600)
latentd_benchmark(moe_benchmark SRCS moe_benchmark.cc
  DEPS latentd_kernel_router latentd_kernel_router_logits latentd_kernel_gather latentd_kernel_bf16_gemm
    latentd_kernel_sampler latentd_device_test
    GTest::gtest)
