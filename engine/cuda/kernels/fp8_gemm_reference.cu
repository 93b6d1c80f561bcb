#include "engine/cuda/kernels/fp8_gemm.h"
#include "engine/cuda/kernels/launch.cuh"

namespace latentd {
namespace {

__device__ float Dot(const Fp8GemmArgs& args, int group, int row, int weight_row, int scale_row) {
  const WeightMatrix& w = args.weight;
  const __nv_fp8_e4m3* weight = w.fp8 + (static_cast<int64_t>(group) * w.n + weight_row) * w.k;
  const __nv_fp8_e4m3* x = args.x.data + static_cast<int64_t>(row) * w.k;
  const int scale_rows = (w.n + kQuantGroup - 1) / kQuantGroup;
  const float* scales =
      w.scales + (static_cast<int64_t>(group) * scale_rows + scale_row) * w.scale_stride;
  float sum = 0;
  for (int block = 0; block < w.k / kQuantGroup; ++block) {
    float products = 0;
    for (int i = block * kQuantGroup; i < (block + 1) * kQuantGroup; ++i)
      products += static_cast<float>(weight[i]) * static_cast<float>(x[i]);
    sum += products * (scales[block] * args.x.scales[block * args.x.scale_stride + row]);
  }
  return sum;
}

// One thread an element of the result.
__global__ void ReferenceKernel(Fp8GemmArgs args) {
  WaitForPrevious();
  LetNextBegin();
  const WeightMatrix& w = args.weight;
  const int column = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y;
  const int columns = args.swiglu ? w.n / 2 : w.n;
  int group = 0;
  if (args.group_offsets != nullptr) {
    if (row < args.group_offsets[0] || row >= args.group_offsets[w.num_groups]) return;
    while (row >= args.group_offsets[group + 1]) ++group;
  }
  if (column >= columns) return;
  float value;
  if (args.swiglu) {
    const int gate_row = column / 8 * 16 + column % 8;
    const float gate = Dot(args, group, row, gate_row, column / kQuantGroup);
    const float up =
        Dot(args, group, row, gate_row + 8, columns / kQuantGroup + column / kQuantGroup);
    value = gate / (1.0f + expf(-gate)) * up;
  } else {
    value = Dot(args, group, row, column, column / kQuantGroup);
  }
  args.out[row * args.out_stride + column] = __float2bfloat16_rn(value);
}

}  // namespace

cudaError_t Fp8GemmReference(const Fp8GemmArgs& args, cudaStream_t stream) {
  if (args.num_rows == 0) return cudaSuccess;
  if (args.num_rows < 0 || args.num_rows > 65535) return cudaErrorInvalidValue;
  const int columns = args.swiglu ? args.weight.n / 2 : args.weight.n;
  constexpr int kBlock = 64;
  const LaunchShape shape = {.grid = dim3((columns + kBlock - 1) / kBlock, args.num_rows),
                             .block = dim3(kBlock)};
  return Launch(ReferenceKernel, shape, stream, args);
}

}  // namespace latentd
