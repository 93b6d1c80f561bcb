// Logits of the router: x gate^T in f32. Bound by the bytes of the gate for few tokens (3.7 MB for
// 256 x 7168), by tensor cores for many.
//
// hidden_size is cut into chunks. A chunk's products are summed by mma.sync in order, eight chunks
// are a slice; chunks and slices are added in order. Few tokens: a warp takes a chunk, a block a
// slice, and the reader adds the slices (SliceLogits). Many: a warp runs through all chunks and
// adds in the same order (TileLogits). So a token's logits are the same bits whatever the number of
// tokens. An f32 gate is three bf16 parts whose sum it is, exactly.

#include <algorithm>

#include "engine/cuda/kernels/launch.cuh"
#include "engine/cuda/kernels/mma_sync.cuh"
#include "engine/cuda/kernels/router_logits.h"

namespace latentd {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kStepK = 32;  // of hidden_size, two steps of the tensor cores
constexpr int kChunksOfSlice = kWarps;
constexpr int kMaxSliceTokens = 1024;  // more: TileLogits

int MaxSlices(int n_routed_experts) {
  const int tiles = (n_routed_experts + 15) / 16;
  return std::clamp(132 / tiles, 1, 32);
}

// How hidden_size is cut: a function of the shape alone.
struct Cut {
  int chunk_steps;  // kStepK of a chunk
  int num_slices;
};
Cut CutOf(int hidden_size, int n_routed_experts) {
  const int steps = hidden_size / kStepK, chunks = MaxSlices(n_routed_experts) * kChunksOfSlice;
  const int chunk_steps = (steps + chunks - 1) / chunks;
  const int slice_steps = chunk_steps * kChunksOfSlice;
  return {chunk_steps, (steps + slice_steps - 1) / slice_steps};
}

// A lane's part of 16 experts x kStepK columns: of rows lane / 4 and lane / 4 + 8 the columns 8 c
// to 8 c + 7, c = lane % 4. The tensor core sees the columns in an order of our own, the same for
// gate and x.
template <typename Gate>
struct GateFragment;

template <>
struct GateFragment<__nv_bfloat16> {
  uint4 rows[2];

  __device__ __forceinline__ void Load(const __nv_bfloat16* row0, const __nv_bfloat16* row1) {
    rows[0] = *reinterpret_cast<const uint4*>(row0);
    rows[1] = *reinterpret_cast<const uint4*>(row1);
  }
  __device__ __forceinline__ void Multiply(float (&sum)[4], const uint4& x) const {
    MmaBf16(sum, rows[0].x, rows[1].x, rows[0].y, rows[1].y, x.x, x.y);
    MmaBf16(sum, rows[0].z, rows[1].z, rows[0].w, rows[1].w, x.z, x.w);
  }
};

template <>
struct GateFragment<float> {
  float rows[2][8];

  __device__ __forceinline__ void Load(const float* row0, const float* row1) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      *reinterpret_cast<float4*>(rows[0] + i) = *reinterpret_cast<const float4*>(row0 + i);
      *reinterpret_cast<float4*>(rows[1] + i) = *reinterpret_cast<const float4*>(row1 + i);
    }
  }
  __device__ __forceinline__ void Multiply(float (&sum)[4], const uint4& x) const {
    // 24 bits of significand are three times the 8 of bf16: each remainder is exact.
    uint32_t parts[3][2][4];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float low = rows[row][2 * i], high = rows[row][2 * i + 1];
#pragma unroll
        for (int part = 0; part < 3; ++part) {
          const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
          parts[part][row][i] = *reinterpret_cast<const uint32_t*>(&pair);
          low -= __low2float(pair);
          high -= __high2float(pair);
        }
      }
    }
#pragma unroll
    for (int part = 2; part >= 0; --part) {
      MmaBf16(sum, parts[part][0][0], parts[part][1][0], parts[part][0][1], parts[part][1][1], x.x,
              x.y);
      MmaBf16(sum, parts[part][0][2], parts[part][1][2], parts[part][0][3], parts[part][1][3], x.z,
              x.w);
    }
  }
};

// Block (i, s, t): experts [16 i, + 16), slice s, tokens [8 kTokenTiles t, + 8 kTokenTiles).
template <typename Gate, int kTokenTiles>
__global__ void __launch_bounds__(kThreads)
    SliceLogits(RouterLogitsArgs args, const Gate* gate, Cut cut) {
  constexpr int kAhead = 4;        // steps of the gate in registers; they come before x is there
  constexpr int kStride = 16 + 4;  // floats of a token in `sums`: no bank conflicts
  __shared__ float sums[kWarps][8 * kTokenTiles][kStride];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int hidden = args.hidden_size, first_expert = blockIdx.x * 16;
  const int first_token = blockIdx.z * 8 * kTokenTiles;
  const int begin = (blockIdx.y * kChunksOfSlice + warp) * cut.chunk_steps;
  const int end = min(begin + cut.chunk_steps, hidden / kStepK);
  const Gate* gate_rows[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int expert = min(first_expert + g + 8 * i, args.n_routed_experts - 1);
    gate_rows[i] = gate + static_cast<int64_t>(expert) * hidden + 8 * c;
  }
  GateFragment<Gate> fragments[kAhead];
  const auto load_gate = [&](int first) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int at = (first + i) * kStepK;
      if (first + i < end) fragments[i].Load(gate_rows[0] + at, gate_rows[1] + at);
    }
  };
  load_gate(begin);
  WaitForPrevious();
  LetNextBegin();

  const __nv_bfloat16* x[kTokenTiles];
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j) {
    const int token = min(first_token + 8 * j + g, args.num_tokens - 1);
    x[j] = args.x + static_cast<int64_t>(token) * hidden + 8 * c;
  }
  float sum[kTokenTiles][4] = {};
  for (int first = begin; first < end; first += kAhead) {
    if (first != begin) load_gate(first);
    uint4 values[kAhead][kTokenTiles];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i < end) {
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          values[i][j] = *reinterpret_cast<const uint4*>(x[j] + (first + i) * kStepK);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i < end) {
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) fragments[i].Multiply(sum[j], values[i][j]);
      }
    }
  }

#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j) {
    float* to = &sums[warp][8 * j + 2 * c][g];
    to[0] = sum[j][0];
    to[kStride] = sum[j][1];
    to[8] = sum[j][2];
    to[kStride + 8] = sum[j][3];
  }
  __syncthreads();
  for (int at = threadIdx.x; at < 16 * 8 * kTokenTiles; at += kThreads) {
    const int local = at / 16, token = first_token + local, expert = first_expert + at % 16;
    if (token >= args.num_tokens || expert >= args.n_routed_experts) continue;
    float total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += sums[w][local][at % 16];
    const int64_t row = static_cast<int64_t>(blockIdx.y) * args.num_tokens + token;
    args.out[row * args.n_routed_experts + expert] = total;
  }
}

constexpr int kTileExperts = 64, kTileTokens = 128;  // of a block of TileLogits; a warp has 32 x 32
constexpr int kStages = 4;

template <typename Gate>
struct alignas(16) LogitStage {
  Gate gate[kTileExperts][kStepK];
  __nv_bfloat16 x[kTileTokens][kStepK];
};

template <typename Gate>
__global__ void __launch_bounds__(kThreads, 2)
    TileLogits(RouterLogitsArgs args, const Gate* gate, Cut cut) {
  extern __shared__ __align__(16) unsigned char shared[];
  auto* stages = reinterpret_cast<LogitStage<Gate>*>(shared);
  WaitForPrevious();
  LetNextBegin();
  const int hidden = args.hidden_size, steps = hidden / kStepK;
  const int first_expert = blockIdx.x * kTileExperts, first_token = blockIdx.y * kTileTokens;
  const auto load = [&](int step) {
    if (step < steps) {
      LogitStage<Gate>& stage = stages[step % kStages];
      constexpr int kGateVectors = kStepK * sizeof(Gate) / 16, kXVectors = kStepK * 2 / 16;
#pragma unroll
      for (int at = threadIdx.x; at < kTileExperts * kGateVectors; at += kThreads) {
        const int row = at / kGateVectors, column = at % kGateVectors * (16 / sizeof(Gate));
        const int expert = min(first_expert + row, args.n_routed_experts - 1);
        CopyAsync16(&stage.gate[row][column],
                    gate + static_cast<int64_t>(expert) * hidden + step * kStepK + column, true);
      }
#pragma unroll
      for (int at = threadIdx.x; at < kTileTokens * kXVectors; at += kThreads) {
        const int row = at / kXVectors, column = at % kXVectors * 8;
        const int token = min(first_token + row, args.num_tokens - 1);
        CopyAsync16(&stage.x[row][column],
                    args.x + static_cast<int64_t>(token) * hidden + step * kStepK + column, true);
      }
    }
    CopyAsyncCommit();
  };

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int warp_expert = warp % 2 * 32, warp_token = warp / 2 * 32;
  float chunk_sum[2][4][4] = {}, slice_sum[2][4][4] = {}, total[2][4][4] = {};
  const auto add = [](float(&to)[2][4][4], float(&from)[2][4][4]) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          to[m][j][i] += from[m][j][i];
          from[m][j][i] = 0;
        }
      }
    }
  };
  for (int step = 0; step < kStages - 1; ++step) load(step);
  int chunk_left = cut.chunk_steps, slice_left = kChunksOfSlice;
  for (int step = 0; step < steps; ++step) {
    CopyAsyncWait<kStages - 2>();
    __syncthreads();  // the step has arrived for all, and all are done with the stage that is
                      // loaded next
    load(step + kStages - 1);
    const LogitStage<Gate>& stage = stages[step % kStages];
    uint4 x[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
      x[j] = *reinterpret_cast<const uint4*>(&stage.x[warp_token + 8 * j + g][8 * c]);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      GateFragment<Gate> fragment;
      fragment.Load(&stage.gate[warp_expert + 16 * m + g][8 * c],
                    &stage.gate[warp_expert + 16 * m + g + 8][8 * c]);
#pragma unroll
      for (int j = 0; j < 4; ++j) fragment.Multiply(chunk_sum[m][j], x[j]);
    }
    if (--chunk_left == 0) {
      chunk_left = cut.chunk_steps;
      add(slice_sum, chunk_sum);
      if (--slice_left == 0) {
        slice_left = kChunksOfSlice;
        add(total, slice_sum);
      }
    }
  }
  add(slice_sum, chunk_sum);
  add(total, slice_sum);

#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int expert = first_expert + warp_expert + 16 * m + 8 * (i / 2) + g;
        const int token = first_token + warp_token + 8 * j + 2 * c + i % 2;
        if (expert < args.n_routed_experts && token < args.num_tokens) {
          args.out[static_cast<int64_t>(token) * args.n_routed_experts + expert] = total[m][j][i];
        }
      }
    }
  }
}

template <typename Gate, int kTokenTiles>
cudaError_t LaunchSlices(const RouterLogitsArgs& args, const Gate* gate, cudaStream_t stream) {
  const Cut cut = CutOf(args.hidden_size, args.n_routed_experts);
  const dim3 grid((args.n_routed_experts + 15) / 16, cut.num_slices,
                  (args.num_tokens + 8 * kTokenTiles - 1) / (8 * kTokenTiles));
  return Launch(SliceLogits<Gate, kTokenTiles>, {.grid = grid, .block = dim3(kThreads)}, stream,
                args, gate, cut);
}

template <typename Gate>
cudaError_t LaunchLogits(const RouterLogitsArgs& args, const Gate* gate, cudaStream_t stream) {
  if (args.num_tokens <= 8) return LaunchSlices<Gate, 1>(args, gate, stream);
  if (args.num_tokens <= 64) return LaunchSlices<Gate, 2>(args, gate, stream);
  if (args.num_tokens <= kMaxSliceTokens) return LaunchSlices<Gate, 4>(args, gate, stream);

  const dim3 grid((args.n_routed_experts + kTileExperts - 1) / kTileExperts,
                  (args.num_tokens + kTileTokens - 1) / kTileTokens);
  constexpr int kShared = kStages * static_cast<int>(sizeof(LogitStage<Gate>));
  const cudaError_t error =
      cudaFuncSetAttribute(TileLogits<Gate>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (error != cudaSuccess) return error;
  return Launch(TileLogits<Gate>, {.grid = grid, .block = dim3(kThreads), .shared_bytes = kShared},
                stream, args, gate, CutOf(args.hidden_size, args.n_routed_experts));
}

}  // namespace

int RouterLogitSlices(int num_tokens, int hidden_size, int n_routed_experts) {
  return num_tokens <= kMaxSliceTokens ? CutOf(hidden_size, n_routed_experts).num_slices : 1;
}

size_t RouterLogitBytes(int max_tokens, int n_routed_experts) {
  const size_t slices = size_t(std::min(max_tokens, kMaxSliceTokens)) * MaxSlices(n_routed_experts);
  return std::max(slices, size_t(max_tokens)) * n_routed_experts * sizeof(float);
}

cudaError_t RouterLogits(const RouterLogitsArgs& args, cudaStream_t stream) {
  if (args.num_tokens < 1 || args.n_routed_experts < 1 || args.hidden_size < kStepK ||
      args.hidden_size % kStepK != 0 || args.x == nullptr || args.out == nullptr ||
      (args.gate_bf16 == nullptr) == (args.gate_f32 == nullptr)) {
    return cudaErrorInvalidValue;
  }
  return args.gate_f32 != nullptr ? LaunchLogits<float>(args, args.gate_f32, stream)
                                  : LaunchLogits<__nv_bfloat16>(args, args.gate_bf16, stream);
}

}  // namespace latentd
