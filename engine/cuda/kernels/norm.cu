// AddNorm and QuantizeRows. Both are bound by memory: the residual stream's 8 bytes a value (read
// and written), 2 of each operand that is added, 1 or 2 of each result.
//
// A warp has one or more of a row's groups of 128 columns. For few rows a cluster of thread blocks
// shares a row, since one multiprocessor alone takes 64 bytes a clock; for many rows a block has a
// row of its own. How a row is spread changes no bit of it (rms_norm.cuh).

#include <algorithm>
#include <limits>

#include "engine/cuda/kernels/cluster.cuh"
#include "engine/cuda/kernels/launch.cuh"
#include "engine/cuda/kernels/norm.h"
#include "engine/cuda/kernels/quantize.cuh"
#include "engine/cuda/kernels/rms_norm.cuh"

namespace latentd {
namespace {

constexpr int kMaxGroups = kMaxNormColumns / kQuantGroup;
constexpr int kNumSms = 132;

enum class Source { kNone, kEmbed, kDelta, kExperts };

__device__ __forceinline__ float4 Add(float4 a, float4 b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

__device__ __forceinline__ float4 LoadBf16(const __nv_bfloat16* p) {
  return UnpackBf16(*reinterpret_cast<const uint2*>(p));
}

// How the rows are spread.
struct Spread {
  int cluster = 1;       // blocks that share a row
  int num_clusters = 1;  // each takes every num_clusters-th row
};

// What the experts give to the token, at columns[q] .. columns[q] + 3.
template <int kQuads, int kChoices>
__device__ __forceinline__ void CombineExperts(const AddNormArgs& args, int64_t token,
                                               const int (&columns)[kQuads],
                                               float4 (&sum)[kQuads]) {
  const int num_choices = args.routing.num_choices;
  const int32_t* rows = args.routing.row_of + token * num_choices;
  const float* weights = args.routing.weights + token * num_choices;
#pragma unroll
  for (int q = 0; q < kQuads; ++q) sum[q] = {0, 0, 0, 0};
  for (int first = 0; first < num_choices; first += kChoices) {
    int row[kChoices];
    float weight[kChoices];
    uint2 x[kChoices][kQuads];
#pragma unroll
    for (int j = 0; j < kChoices; ++j) {
      row[j] = first + j < num_choices ? rows[first + j] : -1;
      weight[j] = first + j < num_choices ? weights[first + j] : 0;
    }
#pragma unroll
    for (int j = 0; j < kChoices; ++j) {
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        x[j][q] = {0, 0};
        if (row[j] >= 0 && columns[q] < args.hidden_size) {
          x[j][q] = *reinterpret_cast<const uint2*>(
              args.expert_out + static_cast<int64_t>(row[j]) * args.hidden_size + columns[q]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kChoices; ++j) {
      if (row[j] < 0) continue;
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        const float4 v = UnpackBf16(x[j][q]);
        sum[q].x = fmaf(weight[j], v.x, sum[q].x);
        sum[q].y = fmaf(weight[j], v.y, sum[q].y);
        sum[q].z = fmaf(weight[j], v.z, sum[q].z);
        sum[q].w = fmaf(weight[j], v.w, sum[q].w);
      }
    }
  }
}

// The row's values in the residual stream, after the addition.
template <Source kSource, int kQuads, int kChoices>
__device__ __forceinline__ void UpdateResidual(const AddNormArgs& args, int row,
                                               const int (&columns)[kQuads],
                                               float4 (&values)[kQuads]) {
  const int hidden_size = args.hidden_size;
  const int64_t token = args.rows != nullptr ? args.rows[row] : row;
  float* residual = args.residual + token * hidden_size;
  float4 delta[kQuads];
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    values[q] = {0, 0, 0, 0};
    if (kSource != Source::kEmbed && columns[q] < hidden_size)
      values[q] = *reinterpret_cast<const float4*>(residual + columns[q]);
  }
  if constexpr (kSource == Source::kExperts) {
    CombineExperts<kQuads, kChoices>(args, token, columns, delta);
  } else if constexpr (kSource != Source::kNone) {
    const __nv_bfloat16* x = kSource == Source::kEmbed
                                 ? args.embed + static_cast<int64_t>(args.tokens[row]) * hidden_size
                                 : args.delta + token * hidden_size;
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      delta[q] = {0, 0, 0, 0};
      if (columns[q] < hidden_size) delta[q] = LoadBf16(x + columns[q]);
    }
  }
  if constexpr (kSource != Source::kNone) {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      values[q] = Add(values[q], delta[q]);
      if (columns[q] < hidden_size) *reinterpret_cast<float4*>(residual + columns[q]) = values[q];
    }
  }
}

// A warp has kQuads groups. kChoices: how many experts' rows are loaded at once.
template <Source kSource, int kQuads, int kChoices, int kThreads, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    AddNormKernel(const __grid_constant__ AddNormArgs args, const Spread spread) {
  // Of all of the row's groups, in each block of the cluster. Two, so that the next row's sums do
  // not meet this row's readers: a block writes row i + 2 after all have read row i.
  __shared__ float group_sums[2][kMaxGroups];
  LetNextBegin();
  const int lane = threadIdx.x % 32;
  const int rank = blockIdx.x % spread.cluster;
  const int first_group = (rank * static_cast<int>(blockDim.x / 32) + threadIdx.x / 32) * kQuads;
  const int num_groups = (args.hidden_size + kQuantGroup - 1) / kQuantGroup;
  if (spread.cluster > 1) ClusterArrive();

  int columns[kQuads];
  float4 weights[kQuads];
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    columns[q] = (first_group + q) * kQuantGroup + 4 * lane;
    weights[q] = {0, 0, 0, 0};
    if (columns[q] < args.hidden_size)
      weights[q] = *reinterpret_cast<const float4*>(args.weight + columns[q]);
  }
  if (spread.cluster > 1) ClusterWait();  // all blocks run: their shared memory is there
  WaitForPrevious();

  int buffer = 0;
  for (int row = blockIdx.x / spread.cluster; row < args.num_rows; row += spread.num_clusters) {
    float4 values[kQuads];
    UpdateResidual<kSource, kQuads, kChoices>(args, row, columns, values);
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const float sum = GroupSquareSum(values[q]);
      if (first_group + q >= num_groups) continue;
      float* at = &group_sums[buffer][first_group + q];
      if (spread.cluster == 1) {
        if (lane == 0) *at = sum;
      } else if (lane < spread.cluster) {
        StoreRemote(reinterpret_cast<uint32_t*>(at), lane, __float_as_uint(sum));
      }
    }
    if (spread.cluster == 1) {
      __syncthreads();
    } else {
      ClusterArrive();
      ClusterWait();
    }
    const float factor = NormFactor(group_sums[buffer], num_groups, args.hidden_size, args.eps);
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      if (first_group + q >= num_groups) continue;
      StoreGroup(args.out, row, args.hidden_size, first_group + q,
                 Normed(values[q], factor, weights[q]), args.power_of_two_scales);
    }
    buffer ^= 1;
  }
}

// How many blocks share a row when each warp has kQuads groups.
template <Source kSource, int kQuads, int kChoices, int kWarps, int kBlocks>
cudaError_t LaunchSpread(const AddNormArgs& args, int cluster, cudaStream_t stream) {
  const int num_groups = (args.hidden_size + kQuantGroup - 1) / kQuantGroup;
  const int num_warps = (num_groups + kQuads - 1) / kQuads;
  cluster = std::max(cluster, (num_warps + kWarps - 1) / kWarps);
  Spread spread;
  spread.cluster = cluster;
  spread.num_clusters = std::min(args.num_rows, kNumSms * kBlocks / cluster);
  LaunchShape shape;
  shape.grid = dim3(spread.num_clusters * cluster);
  shape.block = dim3(32 * ((num_warps + cluster - 1) / cluster));
  shape.cluster = cluster;
  return Launch(AddNormKernel<kSource, kQuads, kChoices, 32 * kWarps, kBlocks>, shape, stream, args,
                spread);
}

// Few rows: a group for a warp, and several blocks for a row, the more the fewer rows. Then a block
// for a row; and of many rows two small blocks a multiprocessor walk over them, unless a row has
// so many operands that one block keeps the multiprocessor busy.
template <Source kSource>
cudaError_t LaunchAddNorm(const AddNormArgs& args, cudaStream_t stream) {
  constexpr bool kManyOperands = kSource == Source::kExperts;
  const int rows = args.num_rows;
  if (rows <= (kManyOperands ? 64 : 48)) {
    int cluster = rows <= 8 ? 8 : rows <= 16 ? 4 : 2;
    while (cluster > 1 && args.hidden_size < 4 * kQuantGroup * cluster) cluster /= 2;
    return LaunchSpread<kSource, 1, 9, 32, 1>(args, cluster, stream);
  }
  if constexpr (!kManyOperands) {
    if (rows > 2 * kNumSms) return LaunchSpread<kSource, 4, 1, 14, 2>(args, 1, stream);
  }
  return LaunchSpread<kSource, 2, 4, 28, 1>(args, 1, stream);
}

constexpr int kQuantizeWarps = 8;
constexpr int kQuantizeBlocks = kNumSms * 8;

// A warp takes kGroups groups of the matrix at a time.
template <int kGroups>
__global__ void __launch_bounds__(kQuantizeWarps * 32)
    QuantizeRowsKernel(const __nv_bfloat16* x, int64_t x_stride, int max_rows,
                       const int32_t* num_rows_device, int columns, bool power_of_two_scales,
                       const Fp8Rows out) {
  LetNextBegin();
  const int lane = threadIdx.x % 32;
  const int groups_of_row = columns / kQuantGroup;
  const int step = gridDim.x * kQuantizeWarps * kGroups;
  int first = (blockIdx.x * kQuantizeWarps + threadIdx.x / 32) * kGroups;
  WaitForPrevious();
  const int num_rows = num_rows_device != nullptr ? min(*num_rows_device, max_rows) : max_rows;
  for (; first < num_rows * groups_of_row; first += step) {
    int rows[kGroups], groups[kGroups];
    uint2 packed[kGroups];
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      rows[i] = i == 0 ? first / groups_of_row : rows[i - 1];
      groups[i] = i == 0 ? first % groups_of_row : groups[i - 1] + 1;
      if (groups[i] == groups_of_row) {
        ++rows[i];
        groups[i] = 0;
      }
      packed[i] = {0, 0};
      if (rows[i] < num_rows) {
        packed[i] = *reinterpret_cast<const uint2*>(x + rows[i] * x_stride +
                                                    groups[i] * kQuantGroup + 4 * lane);
      }
    }
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      if (rows[i] < num_rows)
        StoreFp8Group(out, rows[i], columns, groups[i], UnpackBf16(packed[i]), power_of_two_scales);
    }
  }
}

}  // namespace

cudaError_t AddNorm(const AddNormArgs& args, cudaStream_t stream) {
  const int num_sources =
      (args.embed != nullptr) + (args.delta != nullptr) + (args.expert_out != nullptr);
  if (args.num_rows < 0 || args.hidden_size <= 0 || args.hidden_size % 8 != 0 ||
      args.hidden_size > kMaxGroups * kQuantGroup || args.weight == nullptr ||
      args.residual == nullptr || num_sources > 1 ||
      (args.embed != nullptr) != (args.tokens != nullptr) ||
      !CanStore(args.out, args.num_rows, args.hidden_size)) {
    return cudaErrorInvalidValue;
  }
  if (args.expert_out != nullptr &&
      (args.routing.num_choices <= 0 || args.routing.row_of == nullptr ||
       args.routing.weights == nullptr)) {
    return cudaErrorInvalidValue;
  }
  if (args.num_rows == 0) return cudaSuccess;
  if (args.embed != nullptr) return LaunchAddNorm<Source::kEmbed>(args, stream);
  if (args.delta != nullptr) return LaunchAddNorm<Source::kDelta>(args, stream);
  if (args.expert_out != nullptr) return LaunchAddNorm<Source::kExperts>(args, stream);
  return LaunchAddNorm<Source::kNone>(args, stream);
}

cudaError_t QuantizeRows(const __nv_bfloat16* x, int64_t x_stride, int num_rows,
                         const int32_t* num_rows_device, int columns, bool power_of_two_scales,
                         const Fp8Rows& out, cudaStream_t stream) {
  if (x == nullptr || num_rows < 0 || columns <= 0 || x_stride < columns || x_stride % 4 != 0 ||
      !CanStore(out, num_rows, columns)) {
    return cudaErrorInvalidValue;
  }
  const int64_t num_groups = static_cast<int64_t>(num_rows) * (columns / kQuantGroup);
  if (num_groups > std::numeric_limits<int>::max() / 2) return cudaErrorInvalidValue;
  if (num_rows == 0) return cudaSuccess;
  const bool is_small = num_groups <= kQuantizeBlocks * kQuantizeWarps;
  const int64_t groups_of_block = kQuantizeWarps * (is_small ? 1 : 4);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(
      std::min<int64_t>((num_groups + groups_of_block - 1) / groups_of_block, kQuantizeBlocks)));
  shape.block = dim3(kQuantizeWarps * 32);
  return Launch(is_small ? QuantizeRowsKernel<1> : QuantizeRowsKernel<4>, shape, stream, x,
                x_stride, num_rows, num_rows_device, columns, power_of_two_scales, out);
}

}  // namespace latentd
