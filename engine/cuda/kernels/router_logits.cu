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
constexpr int kMaxSliceTokens = 2048;  // up to here slices are apart
constexpr int kFewExperts = 32;        // with so few, always

int MaxSlices(int n_routed_experts) {
  const int tiles = (n_routed_experts + 15) / 16;
  return std::clamp(132 / tiles, 1, 16);
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
// Its first half is one step of the tensor cores, its second the next. Who has several sums begins
// with the first halves of all: the second of a sum waits for its first.
template <typename Gate>
struct GateFragment;

template <>
struct GateFragment<__nv_bfloat16> {
  uint4 rows[2];

  __device__ __forceinline__ void Load(const __nv_bfloat16* row0, const __nv_bfloat16* row1) {
    rows[0] = *reinterpret_cast<const uint4*>(row0);
    rows[1] = *reinterpret_cast<const uint4*>(row1);
  }
  __device__ __forceinline__ void MultiplyFirst(float (&sum)[4], const uint4& x) const {
    MmaBf16(sum, rows[0].x, rows[1].x, rows[0].y, rows[1].y, x.x, x.y);
  }
  __device__ __forceinline__ void MultiplySecond(float (&sum)[4], const uint4& x) const {
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
  __device__ __forceinline__ void MultiplyFirst(float (&sum)[4], const uint4& x) const {
    Multiply<0>(sum, x.x, x.y);
  }
  __device__ __forceinline__ void MultiplySecond(float (&sum)[4], const uint4& x) const {
    Multiply<4>(sum, x.z, x.w);
  }

 private:
  template <int kFirst>
  __device__ __forceinline__ void Multiply(float (&sum)[4], uint32_t x0, uint32_t x1) const {
    // 24 bits of significand are three times the 8 of bf16: each remainder is exact.
    uint32_t parts[3][2][2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float low = rows[row][kFirst + 2 * i], high = rows[row][kFirst + 2 * i + 1];
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
      MmaBf16(sum, parts[part][0][0], parts[part][1][0], parts[part][0][1], parts[part][1][1], x0,
              x1);
    }
  }
};

template <typename Gate, int kM, int kN>
__device__ __forceinline__ void MultiplyAll(float (&sums)[kM][kN][4],
                                            const GateFragment<Gate> (&gate)[kM],
                                            const uint4 (&x)[kN]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int j = 0; j < kN; ++j) gate[m].MultiplyFirst(sums[m][j], x[j]);
  }
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int j = 0; j < kN; ++j) gate[m].MultiplySecond(sums[m][j], x[j]);
  }
}

// Block (i, s, t): experts [16 kM i, + 16 kM), slice s, tokens [8 kN t, + 8 kN). All that a warp
// reads is under way at once, the gate before x is there.
template <typename Gate, int kM, int kN, int kAhead>
__global__ void __launch_bounds__(kThreads)
    SliceLogits(RouterLogitsArgs args, const Gate* gate, Cut cut) {
  constexpr int kStride = 16 * kM + 4;  // floats of a token in `sums`: no bank conflicts
  __shared__ float sums[kWarps][8 * kN][kStride];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int hidden = args.hidden_size;
  const int first_expert = blockIdx.x * 16 * kM, first_token = blockIdx.z * 8 * kN;
  const int begin = (blockIdx.y * kChunksOfSlice + warp) * cut.chunk_steps;
  const int end = min(begin + cut.chunk_steps, hidden / kStepK);
  const auto row = [&](const auto* matrix, int index, int rows) {
    return matrix + static_cast<int64_t>(min(index, rows - 1)) * hidden + 8 * c;
  };
  const Gate* gate_rows[2 * kM];
#pragma unroll
  for (int i = 0; i < 2 * kM; ++i) {
    gate_rows[i] = row(gate, first_expert + g + 8 * i, args.n_routed_experts);
  }
  GateFragment<Gate> fragments[kAhead][kM];
  const auto load_gate = [&](int first) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int at = (first + i) * kStepK;
      if (first + i >= end) break;
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        fragments[i][m].Load(gate_rows[2 * m] + at, gate_rows[2 * m + 1] + at);
      }
    }
  };
  load_gate(begin);
  WaitForPrevious();
  LetNextBegin();

  const __nv_bfloat16* x_rows[kN];
#pragma unroll
  for (int j = 0; j < kN; ++j) x_rows[j] = row(args.x, first_token + 8 * j + g, args.num_tokens);
  float sum[kM][kN][4] = {};
  for (int first = begin; first < end; first += kAhead) {
    if (first != begin) load_gate(first);
    uint4 x[kAhead][kN];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= end) break;
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        x[i][j] = *reinterpret_cast<const uint4*>(x_rows[j] + (first + i) * kStepK);
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= end) break;
      MultiplyAll(sum, fragments[i], x[i]);
    }
  }

#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      float* to = &sums[warp][8 * j + 2 * c][16 * m + g];
      to[0] = sum[m][j][0];
      to[kStride] = sum[m][j][1];
      to[8] = sum[m][j][2];
      to[kStride + 8] = sum[m][j][3];
    }
  }
  __syncthreads();
  float* out =
      args.out + static_cast<int64_t>(blockIdx.y) * args.num_tokens * args.n_routed_experts;
#pragma unroll 1
  for (int at = threadIdx.x; at < 16 * kM * 8 * kN; at += kThreads) {
    const int local = at / (16 * kM), token = first_token + local;
    const int expert = first_expert + at % (16 * kM);
    if (token >= args.num_tokens || expert >= args.n_routed_experts) continue;
    float total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += sums[w][local][at % (16 * kM)];
    out[static_cast<int64_t>(token) * args.n_routed_experts + expert] = total;
  }
}

// A block of TileLogits: 8 warps, kExpertWarps of them side by side over experts, each 16 kM
// experts by 8 kN tokens.
template <int kExpertWarps_, int kM_, int kN_>
struct Tile {
  static constexpr int kExpertWarps = kExpertWarps_, kM = kM_, kN = kN_;
  static constexpr int kExperts = 16 * kM * kExpertWarps;
  static constexpr int kTokens = 8 * kN * (kWarps / kExpertWarps);
  static constexpr int kStages = kExperts + kTokens <= 192 ? 3 : 4;  // 2 blocks, or 1
};

// The ring of shared memory. A row of a step is 64 bytes (or 128): loads of eight rows by 16 bytes
// a lane meet no bank twice.
constexpr int kStageSteps = 2;
template <typename Gate, typename Tile>
struct alignas(16) Stage {
  Gate gate[kStageSteps][Tile::kExperts][kStepK];
  __nv_bfloat16 x[kStageSteps][Tile::kTokens][kStepK];
};
template <typename Gate, typename Tile>
struct TileShared {
  Stage<Gate, Tile> stages[Tile::kStages];
  float total[Tile::kM * Tile::kN * 4][kThreads];  // of each thread: seldom touched
};

// Block (i, t, z): tile i of experts, tile t of tokens; of slice z, or of all when there is one z.
template <typename Gate, typename Tile>
__global__ void __launch_bounds__(kThreads)
    TileLogits(RouterLogitsArgs args, const Gate* gate, Cut cut) {
  extern __shared__ __align__(16) unsigned char shared[];
  constexpr int kStages = Tile::kStages;
  auto& [stages, total] = *reinterpret_cast<TileShared<Gate, Tile>*>(shared);
  WaitForPrevious();
  LetNextBegin();
  const int hidden = args.hidden_size;
  const int first_expert = blockIdx.x * Tile::kExperts, first_token = blockIdx.y * Tile::kTokens;
  const int slice_steps = cut.chunk_steps * kChunksOfSlice;
  const int begin = blockIdx.z * slice_steps;
  const int end = gridDim.z == 1 ? hidden / kStepK : min(begin + slice_steps, hidden / kStepK);

  const auto load = [&](int first_step) {  // and the next, into the stage of both
    Stage<Gate, Tile>& stage = stages[(first_step - begin) / kStageSteps % kStages];
    constexpr int kGateVectors = kStepK * sizeof(Gate) / 16, kXVectors = kStepK * 2 / 16;
#pragma unroll
    for (int s = 0; s < kStageSteps; ++s) {
      const int from = (first_step + s) * kStepK;
      if (first_step + s >= end) break;
#pragma unroll
      for (int at = threadIdx.x; at < Tile::kExperts * kGateVectors; at += kThreads) {
        const int row = at / kGateVectors, column = at % kGateVectors * (16 / sizeof(Gate));
        const int expert = min(first_expert + row, args.n_routed_experts - 1);
        CopyAsync16(&stage.gate[s][row][column],
                    gate + static_cast<int64_t>(expert) * hidden + from + column, true);
      }
#pragma unroll
      for (int at = threadIdx.x; at < Tile::kTokens * kXVectors; at += kThreads) {
        const int row = at / kXVectors, column = at % kXVectors * 8;
        const int token = min(first_token + row, args.num_tokens - 1);
        CopyAsync16(&stage.x[s][row][column],
                    args.x + static_cast<int64_t>(token) * hidden + from + column, true);
      }
    }
    CopyAsyncCommit();  // also an empty group: the count below stays right
  };

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int warp_expert = warp % Tile::kExpertWarps * 16 * Tile::kM;
  const int warp_token = warp / Tile::kExpertWarps * 8 * Tile::kN;
  float chunk_sum[Tile::kM][Tile::kN][4] = {}, slice_sum[Tile::kM][Tile::kN][4] = {};
  const auto for_each = [](const auto& take) {
#pragma unroll
    for (int m = 0; m < Tile::kM; ++m) {
#pragma unroll
      for (int j = 0; j < Tile::kN; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) take(m, j, i);
      }
    }
  };
  const auto end_chunk = [&] {
    for_each([&](int m, int j, int i) {
      slice_sum[m][j][i] += chunk_sum[m][j][i];
      chunk_sum[m][j][i] = 0;
    });
  };
  const auto end_slice = [&] {
    for_each([&](int m, int j, int i) {
      total[(m * Tile::kN + j) * 4 + i][threadIdx.x] += slice_sum[m][j][i];
      slice_sum[m][j][i] = 0;
    });
  };
  for_each([&](int m, int j, int i) { total[(m * Tile::kN + j) * 4 + i][threadIdx.x] = 0; });
  for (int i = 0; i < kStages - 1; ++i) load(begin + i * kStageSteps);
  int chunk_left = cut.chunk_steps, slice_left = kChunksOfSlice;
  for (int first = begin; first < end; first += kStageSteps) {
    CopyAsyncWait<kStages - 2>();
    // The steps have arrived for all, and all are done with the stage that is loaded next.
    __syncthreads();
    load(first + (kStages - 1) * kStageSteps);
    const Stage<Gate, Tile>& stage = stages[(first - begin) / kStageSteps % kStages];
#pragma unroll
    for (int s = 0; s < kStageSteps; ++s) {
      if (first + s >= end) break;
      uint4 x[Tile::kN];
#pragma unroll
      for (int j = 0; j < Tile::kN; ++j) {
        x[j] = *reinterpret_cast<const uint4*>(&stage.x[s][warp_token + 8 * j + g][8 * c]);
      }
      GateFragment<Gate> fragments[Tile::kM];
#pragma unroll
      for (int m = 0; m < Tile::kM; ++m) {
        fragments[m].Load(&stage.gate[s][warp_expert + 16 * m + g][8 * c],
                          &stage.gate[s][warp_expert + 16 * m + g + 8][8 * c]);
      }
      MultiplyAll(chunk_sum, fragments, x);
      if (--chunk_left > 0) continue;
      chunk_left = cut.chunk_steps;
      end_chunk();
      if (--slice_left > 0) continue;
      slice_left = kChunksOfSlice;
      end_slice();
    }
  }
  end_chunk();
  end_slice();

  float* out =
      args.out + static_cast<int64_t>(blockIdx.z) * args.num_tokens * args.n_routed_experts;
  for_each([&](int m, int j, int i) {
    const int expert = first_expert + warp_expert + 16 * m + 8 * (i / 2) + g;
    const int token = first_token + warp_token + 8 * j + 2 * c + i % 2;
    if (expert < args.n_routed_experts && token < args.num_tokens) {
      out[static_cast<int64_t>(token) * args.n_routed_experts + expert] =
          total[(m * Tile::kN + j) * 4 + i][threadIdx.x];
    }
  });
}

template <int kM, int kN, int kAhead = 4, typename Gate>
cudaError_t LaunchSlices(const RouterLogitsArgs& args, const Gate* gate, cudaStream_t stream) {
  const Cut cut = CutOf(args.hidden_size, args.n_routed_experts);
  const dim3 grid((args.n_routed_experts + 16 * kM - 1) / (16 * kM), cut.num_slices,
                  (args.num_tokens + 8 * kN - 1) / (8 * kN));
  return Launch(SliceLogits<Gate, kM, kN, kAhead>, {.grid = grid, .block = dim3(kThreads)}, stream,
                args, gate, cut);
}

template <typename Tile, typename Gate>
cudaError_t LaunchTiles(const RouterLogitsArgs& args, const Gate* gate, cudaStream_t stream) {
  const Cut cut = CutOf(args.hidden_size, args.n_routed_experts);
  const dim3 grid((args.n_routed_experts + Tile::kExperts - 1) / Tile::kExperts,
                  (args.num_tokens + Tile::kTokens - 1) / Tile::kTokens,
                  RouterLogitSlices(args.num_tokens, args.hidden_size, args.n_routed_experts));
  constexpr int kShared = static_cast<int>(sizeof(TileShared<Gate, Tile>));
  const auto kernel = TileLogits<Gate, Tile>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (error != cudaSuccess) return error;
  return Launch(kernel, {.grid = grid, .block = dim3(kThreads), .shared_bytes = kShared}, stream,
                args, gate, cut);
}

template <typename Gate>
cudaError_t LaunchLogits(const RouterLogitsArgs& args, const Gate* gate, cudaStream_t stream) {
  const int tokens = args.num_tokens;
  if (args.n_routed_experts <= kFewExperts) {
    if (tokens <= 64) return LaunchSlices<1, 1>(args, gate, stream);
    return LaunchSlices<1, 4, 1>(args, gate, stream);
  }
  if (tokens <= 8) return LaunchSlices<1, 1>(args, gate, stream);
  if (tokens <= 16) return LaunchSlices<1, 2>(args, gate, stream);
  if constexpr (sizeof(Gate) == 2) {  // an f32 gate takes twice the registers
    if (tokens <= 32) return LaunchSlices<1, 4>(args, gate, stream);
    if (tokens <= 64) return LaunchSlices<2, 4>(args, gate, stream);
    if (tokens <= 256) return LaunchSlices<2, 4, 2>(args, gate, stream);
    if (tokens > kMaxSliceTokens) return LaunchTiles<Tile<2, 4, 4>>(args, gate, stream);
  }
  return LaunchTiles<Tile<2, 2, 4>>(args, gate, stream);
}

}  // namespace

int RouterLogitSlices(int num_tokens, int hidden_size, int n_routed_experts) {
  const bool slices = num_tokens <= kMaxSliceTokens || n_routed_experts <= kFewExperts;
  return slices ? CutOf(hidden_size, n_routed_experts).num_slices : 1;
}

size_t RouterLogitBytes(int max_tokens, int n_routed_experts) {
  const int slice_tokens =
      n_routed_experts <= kFewExperts ? max_tokens : std::min(max_tokens, kMaxSliceTokens);
  const size_t rows = size_t(slice_tokens) * MaxSlices(n_routed_experts);
  return std::max(rows, size_t(max_tokens)) * n_routed_experts * sizeof(float);
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
