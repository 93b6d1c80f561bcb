// AbsorbQuery and ProjectValue of mla_projection.h: for each head a product of its own, of a few
// rows with 128 KB of weights, so bound by the 16.8 MB of all heads' weights at up to 128 tokens.
//
// A block has a head, whose weights fit in shared memory whole. They are asked for in bulk copies
// before the previous kernel has ended, and arrive in four chunks, a barrier each; the tokens' rows
// come through ordinary loads beside them. Many tokens are walked over in tiles, with the next
// tile's rows on their way. The product is mma.sync with the tokens as its rows. Within 32 of the
// reduction's values their order is free if both operands keep to it: thread j of a quad takes
// values 8 j .. 8 j + 7, so that one 16-byte load from a row makes the fragments of two
// instructions.

#include "engine/cuda/kernels/launch.cuh"
#include "engine/cuda/kernels/mla_projection.h"
#include "engine/cuda/kernels/mma_sync.cuh"
#include "engine/cuda/kernels/ptx.cuh"
#include "engine/cuda/kernels/quantize.cuh"
#include "engine/cuda/kernels/rope.cuh"

namespace latentd {
namespace {

constexpr int kNopeDim = 128;
constexpr int kHeadDim = kNopeDim + kRopeDim;
constexpr int kLatentDim = 512;
constexpr int kValueDim = 128;
constexpr int kMmaRows = 16;  // tokens of an instruction
constexpr int kMmaColumns = 8;
constexpr int kStep = 32;      // of the reduction: two instructions
constexpr int kNumChunks = 4;  // of a head's weights

// Four 8 x 8 matrices, each transposed on the way: lane i gives the address of row i % 8 of matrix
// i / 8, and gets the elements of rows 2 (i % 4), + 1 in column i / 4 of each.
__device__ __forceinline__ void LoadMatrixTransposed(uint32_t address, uint32_t (&r)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ uint32_t PackBf16(float a, float b) {
  const __nv_bfloat162 packed = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&packed);
}

// One step of 32 for kTiles x 16 tokens and 4 x 8 columns. `a`: this thread's 16 bytes of the first
// token's row, with `a_stride` bytes from row to row; b[n]: the fragments of 8 columns for both
// instructions.
template <int kTiles>
__device__ __forceinline__ void MultiplyStep(const uint8_t* a, int a_stride,
                                             const uint32_t (&b)[4][4], float (&d)[kTiles][4][4]) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    const uint4 top = *reinterpret_cast<const uint4*>(a + m * kMmaRows * a_stride);
    const uint4 bottom = *reinterpret_cast<const uint4*>(a + (m * kMmaRows + 8) * a_stride);
#pragma unroll
    for (int n = 0; n < 4; ++n)
      MmaBf16(d[m][n], top.x, bottom.x, top.y, bottom.y, b[n][0], b[n][1]);
#pragma unroll
    for (int n = 0; n < 4; ++n)
      MmaBf16(d[m][n], top.z, bottom.z, top.w, bottom.w, b[n][2], b[n][3]);
  }
}

// Tokens [first, first + kTiles * 16) of a matrix with kRowVectors 16-byte vectors a row, on their
// way to shared memory. What is beyond num_tokens stays there as it was: no token's result depends
// on another's row.
template <int kTiles, int kRowVectors, int kThreads>
class TokenLoad {
 public:
  __device__ __forceinline__ void Begin(const __nv_bfloat16* from, int64_t stride, int first,
                                        int num_tokens) {
    num_tokens_ = num_tokens - first;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (Token(i) < num_tokens_) {
        vectors_[i] = *reinterpret_cast<const uint4*>(from + (first + Token(i)) * stride +
                                                      threadIdx.x % kRowVectors * 8);
      }
    }
  }
  __device__ __forceinline__ void Store(uint8_t* to, int to_stride) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (Token(i) < num_tokens_) {
        *reinterpret_cast<uint4*>(to + Token(i) * to_stride + threadIdx.x % kRowVectors * 16) =
            vectors_[i];
      }
    }
  }

 private:
  static constexpr int kEach = kTiles * kMmaRows * kRowVectors / kThreads;
  static constexpr int kRowsAtOnce = kThreads / kRowVectors;
  static_assert(kEach * kRowsAtOnce == kTiles * kMmaRows);
  __device__ __forceinline__ static int Token(int i) {
    return i * kRowsAtOnce + static_cast<int>(threadIdx.x) / kRowVectors;
  }

  int num_tokens_;
  uint4 vectors_[kEach];
};

// Weights pass through the L2 cache once: they shall not drive out what is read again.
__device__ __forceinline__ void LoadOnce(uint32_t to, const void* from, uint32_t bytes,
                                         uint32_t barrier) {
  asm volatile(
      "{ .reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0; "
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], policy; }" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// By the block's first warp.
__device__ __forceinline__ void InitBarriers(uint64_t* barriers, uint32_t chunk_bytes) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < kNumChunks; ++i) MbarrierInit(SharedAddress(&barriers[i]), 1);
    FenceMbarrierInit();
    for (int i = 0; i < kNumChunks; ++i)
      MbarrierArriveExpect(SharedAddress(&barriers[i]), chunk_bytes);
  }
}

// How many chunks are asked for before the previous kernel has ended. The others wait for the
// tokens' rows to be asked for first: else many rows, queued behind all weights, would come last,
// and nothing be computed meanwhile.
constexpr int EarlyChunks(int tiles) { return kNumChunks - tiles / 2; }

// --- AbsorbQuery. A chunk is 128 of the 512 columns, so that the first results leave while weights
// still arrive. A warp has 32 columns of every second chunk for kTiles x 16 tokens, whose rows it
// keeps in registers: 4 x 2 warps, and kSets of them for more tokens.

struct AbsorbShape {
  static constexpr int kChunk = kLatentDim / kNumChunks;
  static constexpr int kStride = kChunk * 2 + 16;  // bytes; ldmatrix without bank conflicts
  static constexpr int kChunkBytes = kNopeDim * kStride;
  static constexpr int kSharedBytes = kNumChunks * kChunkBytes + kNumChunks * 8;
};

// The row of shared memory for row d of the weights: in the order in which the instructions of a
// step take them.
__device__ __forceinline__ int AbsorbRow(int d) {
  const int pair = d % 8 / 2;  // 0, 1: the first instruction; in each the lower, then the upper k
  return d / kStep * kStep + pair / 2 * 16 + pair % 2 * 8 + d % kStep / 8 * 2 + d % 2;
}

// Of kTiles x 16 tokens the 128 dims without position: rows lane / 4 and that + 8 of each tile.
template <int kTiles>
class QueryRows {
 public:
  __device__ __forceinline__ void Load(const AbsorbQueryArgs& args, int first_token, int head) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      const int64_t token = first_token + 8 * i + lane / 4;
      const __nv_bfloat16* row = args.q + token * args.q_stride + head * kHeadDim + lane % 4 * 8;
#pragma unroll
      for (int step = 0; step < kNopeDim / kStep; ++step) {
        rows_[i][step] = {0, 0, 0, 0};
        if (token < args.num_tokens)
          rows_[i][step] = *reinterpret_cast<const uint4*>(row + step * kStep);
      }
    }
  }
  // d = queries * weights of four times eight columns, at `address`, this lane's in the first row.
  __device__ __forceinline__ void Multiply(uint32_t address, float (&d)[kTiles][4][4]) const {
#pragma unroll
    for (int step = 0; step < kNopeDim / kStep; ++step) {
#pragma unroll
      for (int instruction = 0; instruction < 2; ++instruction) {
        uint32_t b[2][4];
        const uint32_t row = address + (step * kStep + instruction * 16) * AbsorbShape::kStride;
        LoadMatrixTransposed(row, b[0]);
        LoadMatrixTransposed(row + 2 * kMmaColumns * 2, b[1]);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          const uint4 top = rows_[2 * m][step], bottom = rows_[2 * m + 1][step];
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            const uint32_t(&two)[4] = b[n / 2];
            if (instruction == 0) {
              MmaBf16(d[m][n], top.x, bottom.x, top.y, bottom.y, two[n % 2 * 2],
                      two[n % 2 * 2 + 1]);
            } else {
              MmaBf16(d[m][n], top.z, bottom.z, top.w, bottom.w, two[n % 2 * 2],
                      two[n % 2 * 2 + 1]);
            }
          }
        }
      }
    }
  }

 private:
  uint4 rows_[2 * kTiles][kNopeDim / kStep];
};

template <int kTiles>
__device__ __forceinline__ void StoreQueries(const AbsorbQueryArgs& args, int first_token, int head,
                                             int column, float (&d)[kTiles][4][4]) {
  const int lane = threadIdx.x % 32;
  const int j = lane % 4;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t w[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) w[n] = PackBf16(d[m][n][2 * half], d[m][n][2 * half + 1]);
        // Thread j of a quad has columns 2 j, 2 j + 1 of each eight; it shall have all of eight j.
#pragma unroll
      for (int n = 0; n < 4; n += 2) {
        const uint32_t got = __shfl_xor_sync(0xffffffffu, j & 1 ? w[n] : w[n + 1], 1);
        (j & 1 ? w[n] : w[n + 1]) = got;
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint32_t got = __shfl_xor_sync(0xffffffffu, j & 2 ? w[n] : w[n + 2], 2);
        (j & 2 ? w[n] : w[n + 2]) = got;
      }
      const int token = first_token + m * kMmaRows + half * 8 + lane / 4;
      if (token < args.num_tokens) {
        __nv_bfloat16* out = args.out + (static_cast<int64_t>(token) * args.num_heads + head) *
                                            (kLatentDim + kRopeDim);
        *reinterpret_cast<uint4*>(out + column + 8 * j) = {w[0], w[1], w[2], w[3]};
      }
    }
  }
}

// The rope part of this warp's tokens: begun before the product and ended after it, to wait for
// nothing.
template <int kTokens>
class QueryRotation {
 public:
  __device__ __forceinline__ QueryRotation(const AbsorbQueryArgs& args, int first_token, int step,
                                           int head)
      : first_token_(first_token), step_(step) {
    int positions[kTokens];
#pragma unroll
    for (int i = 0; i < kTokens; ++i)
      positions[i] = Token(i) < args.num_tokens ? args.positions[Token(i)] : 0;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (Token(i) < args.num_tokens) {
        pairs_[i] = LoadPair(args.rope, positions[i],
                             args.q + Token(i) * args.q_stride + head * kHeadDim + kNopeDim);
      }
    }
  }
  __device__ __forceinline__ void Store(const AbsorbQueryArgs& args, int head) const {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (Token(i) < args.num_tokens) {
        StorePair(
            pairs_[i],
            args.out + (Token(i) * args.num_heads + head) * (kLatentDim + kRopeDim) + kLatentDim);
      }
    }
  }

 private:
  __device__ __forceinline__ int64_t Token(int i) const { return first_token_ + i * step_; }

  int first_token_, step_;
  RopePair pairs_[kTokens];
};

template <int kTiles, int kSets, bool kManyTiles>
__global__ void __launch_bounds__(kSets * 256, 1)
    AbsorbQueryKernel(const __grid_constant__ AbsorbQueryArgs args) {
  using Shape = AbsorbShape;
  constexpr int kTokens = kTiles * kSets * kMmaRows;
  constexpr int kWarps = kSets * 8;
  extern __shared__ __align__(128) uint8_t weights[];
  uint64_t* barriers = reinterpret_cast<uint64_t*>(weights + kNumChunks * Shape::kChunkBytes);
  LetNextBegin();
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int head = blockIdx.x;

  InitBarriers(barriers, kNopeDim * Shape::kChunk * 2);
  __syncthreads();
  const auto load_weights = [&](int first_chunk, int end_chunk) {
    constexpr int kRowsOfWarp = kNopeDim / kWarps;
    if (lane >= kRowsOfWarp) return;
    const int d = warp * kRowsOfWarp + lane;
    for (int chunk = first_chunk; chunk < end_chunk; ++chunk) {
      LoadOnce(SharedAddress(weights + chunk * Shape::kChunkBytes + AbsorbRow(d) * Shape::kStride),
               args.w_uk + (static_cast<int64_t>(head) * kNopeDim + d) * kLatentDim +
                   chunk * Shape::kChunk,
               Shape::kChunk * 2, SharedAddress(&barriers[chunk]));
    }
  };
  constexpr int kEarly = EarlyChunks(kTiles * kSets);
  load_weights(0, kEarly);
  WaitForPrevious();

  const int columns = warp % 4 * 32;
  // Lane l gives the address of row l % 16 of the upper or lower eight columns.
  const uint32_t address =
      SharedAddress(weights) + lane % 16 * Shape::kStride + (columns + lane / 16 * 8) * 2;
  const int set = warp / 8 * kTiles * kMmaRows;  // the first token of this warp in a tile
  QueryRows<kTiles> queries;
  queries.Load(args, set, head);
  load_weights(kEarly, kNumChunks);
  for (int first_token = 0;; first_token += kTokens) {
    const QueryRotation<2 * kTiles> rotation(args, first_token + warp, kWarps, head);
    QueryRows<kTiles> next;
    if constexpr (kManyTiles) next.Load(args, first_token + kTokens + set, head);
    for (int chunk = warp / 4 % 2; chunk < kNumChunks; chunk += 2) {
      MbarrierWait(SharedAddress(&barriers[chunk]), 0);
      float d[kTiles][4][4] = {};
      queries.Multiply(address + chunk * Shape::kChunkBytes, d);
      StoreQueries<kTiles>(args, first_token + set, head, chunk * Shape::kChunk + columns, d);
    }
    rotation.Store(args, head);
    if (!kManyTiles || first_token + kTokens >= args.num_tokens) return;
    if constexpr (kManyTiles) queries = next;
  }
}

// --- ProjectValue. A block has a head, since its 128 values share a scale. A warp has 32 columns
// for kTiles x 16 tokens and one half of each chunk of the reduction: 4 x 2 warps, and kSets of
// them for more tokens. The halves meet in shared memory.

struct ProjectShape {
  static constexpr int kChunk = kLatentDim / kNumChunks;
  static constexpr int kStride = kLatentDim * 2 + 64;  // bytes; two rows of 64 bytes fill the banks
  static constexpr int kWeightBytes = kValueDim * kStride;
  static constexpr int kSumStride = kValueDim + 4;  // floats
  static_assert(2 * kSumStride * 4 <= kStride);     // both halves' sums fit where the tokens lay
  static constexpr int SharedBytes(int tiles) {
    return kWeightBytes + tiles * kMmaRows * kStride + kNumChunks * 8;
  }
};

template <int kTiles, int kSets, bool kManyTiles>
__global__ void __launch_bounds__(kSets * 256, 1)
    ProjectValueKernel(const __grid_constant__ ProjectValueArgs args) {
  using Shape = ProjectShape;
  constexpr int kTokens = kTiles * kSets * kMmaRows;
  constexpr int kWarps = kSets * 8;
  extern __shared__ __align__(128) uint8_t shared[];
  uint8_t* weights = shared;
  uint8_t* latents = weights + Shape::kWeightBytes;
  float* sums = reinterpret_cast<float*>(latents);  // [2, kTokens, kSumStride]
  uint64_t* barriers = reinterpret_cast<uint64_t*>(latents + kTokens * Shape::kStride);
  LetNextBegin();
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int head = blockIdx.x;

  InitBarriers(barriers, kValueDim * Shape::kChunk * 2);
  __syncthreads();
  const auto load_weights = [&](int first_chunk, int end_chunk) {
    constexpr int kRowsOfWarp = kValueDim / kWarps;
    if (lane >= kRowsOfWarp) return;
    const int v = warp * kRowsOfWarp + lane;
    for (int chunk = first_chunk; chunk < end_chunk; ++chunk) {
      LoadOnce(SharedAddress(weights + v * Shape::kStride + chunk * Shape::kChunk * 2),
               args.w_uv + (static_cast<int64_t>(head) * kValueDim + v) * kLatentDim +
                   chunk * Shape::kChunk,
               Shape::kChunk * 2, SharedAddress(&barriers[chunk]));
    }
  };
  constexpr int kEarly = EarlyChunks(kTiles * kSets);
  load_weights(0, kEarly);
  WaitForPrevious();

  const int columns = warp % 4 * 32;
  const int reduction_half = warp / 4 % 2;
  const int tokens = warp / 8 * kTiles * kMmaRows;  // the first of the block's
  const int offset =
      reduction_half * Shape::kChunk + lane % 4 * 16;  // bytes: half of kChunk values
  const uint8_t* weight = weights + (columns + lane / 4) * Shape::kStride + offset;
  const uint8_t* latent = latents + (tokens + lane / 4) * Shape::kStride + offset;
  TokenLoad<kTiles * kSets, kLatentDim / 8, kSets * 256> load;
  const auto begin_load = [&](int first_token) {
    load.Begin(args.latent + head * kLatentDim, static_cast<int64_t>(args.num_heads) * kLatentDim,
               first_token, args.num_tokens);
  };
  begin_load(0);
  load_weights(kEarly, kNumChunks);
  for (int first_token = 0;; first_token += kTokens) {
    load.Store(latents, Shape::kStride);
    __syncthreads();
    if constexpr (kManyTiles) begin_load(first_token + kTokens);
    float d[kTiles][4][4] = {};
    for (int chunk = 0; chunk < kNumChunks; ++chunk) {
      MbarrierWait(SharedAddress(&barriers[chunk]), 0);
#pragma unroll
      for (int step = 0; step < Shape::kChunk / 2 / kStep; ++step) {
        const int at = (chunk * Shape::kChunk + step * kStep) * 2;
        uint32_t b[4][4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const uint4 w =
              *reinterpret_cast<const uint4*>(weight + n * kMmaColumns * Shape::kStride + at);
          b[n][0] = w.x;
          b[n][1] = w.y;
          b[n][2] = w.z;
          b[n][3] = w.w;
        }
        MultiplyStep<kTiles>(latent + at, Shape::kStride, b, d);
      }
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = tokens + m * kMmaRows + half * 8 + lane / 4;
        float* sum =
            sums + (reduction_half * kTokens + token) * Shape::kSumStride + columns + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          *reinterpret_cast<float2*>(sum + n * kMmaColumns) = {d[m][n][2 * half],
                                                               d[m][n][2 * half + 1]};
        }
      }
    }
    __syncthreads();
    const int num_tokens = min(kTokens, args.num_tokens - first_token);
#pragma unroll
    for (int i = 0; i < kTokens / kWarps; ++i) {
      const int token = i * kWarps + warp;
      if (token >= num_tokens) continue;
      const float* sum = sums + token * Shape::kSumStride + 4 * lane;
      const float4 x = *reinterpret_cast<const float4*>(sum);
      const float4 y = *reinterpret_cast<const float4*>(sum + kTokens * Shape::kSumStride);
      StoreGroup(args.out, first_token + token, args.num_heads * kValueDim, head,
                 {x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w}, args.power_of_two_scales);
    }
    if (!kManyTiles || first_token + kTokens >= args.num_tokens) return;
    __syncthreads();
  }
}

template <typename Args>
cudaError_t LaunchProduct(void (*kernel)(Args), int num_blocks, int num_threads, int shared_bytes,
                          const Args& args, cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  LaunchShape shape;
  shape.grid = dim3(num_blocks);
  shape.block = dim3(num_threads);
  shape.shared_bytes = shared_bytes;
  return Launch(kernel, shape, stream, args);
}

template <int kTiles, int kSets, bool kManyTiles = false>
cudaError_t LaunchAbsorb(const AbsorbQueryArgs& args, cudaStream_t stream) {
  return LaunchProduct(AbsorbQueryKernel<kTiles, kSets, kManyTiles>, args.num_heads, kSets * 256,
                       AbsorbShape::kSharedBytes, args, stream);
}
template <int kTiles, int kSets, bool kManyTiles = false>
cudaError_t LaunchProject(const ProjectValueArgs& args, cudaStream_t stream) {
  return LaunchProduct(ProjectValueKernel<kTiles, kSets, kManyTiles>, args.num_heads, kSets * 256,
                       ProjectShape::SharedBytes(kTiles * kSets), args, stream);
}

}  // namespace

cudaError_t AbsorbQuery(const AbsorbQueryArgs& args, cudaStream_t stream) {
  if (args.num_tokens < 0 || args.num_heads <= 0 || args.q == nullptr ||
      args.q_stride < args.num_heads * kHeadDim || args.q_stride % 8 != 0 || args.w_uk == nullptr ||
      !IsSet(args.rope) || args.positions == nullptr || args.out == nullptr) {
    return cudaErrorInvalidValue;
  }
  if (args.num_tokens == 0) return cudaSuccess;
  if (args.num_tokens <= kMmaRows) return LaunchAbsorb<1, 1>(args, stream);
  if (args.num_tokens <= 2 * kMmaRows) return LaunchAbsorb<1, 2>(args, stream);
  if (args.num_tokens <= 4 * kMmaRows) return LaunchAbsorb<2, 2>(args, stream);
  return LaunchAbsorb<1, 2, /*kManyTiles=*/true>(args, stream);
}

cudaError_t ProjectValue(const ProjectValueArgs& args, cudaStream_t stream) {
  if (args.num_tokens < 0 || args.num_heads <= 0 || args.latent == nullptr ||
      args.w_uv == nullptr || !CanStore(args.out, args.num_tokens, args.num_heads * kValueDim)) {
    return cudaErrorInvalidValue;
  }
  if (args.num_tokens == 0) return cudaSuccess;
  if (args.num_tokens <= kMmaRows) return LaunchProject<1, 1>(args, stream);
  if (args.num_tokens <= 2 * kMmaRows) return LaunchProject<1, 2>(args, stream);
  if (args.num_tokens <= 4 * kMmaRows) return LaunchProject<2, 2>(args, stream);
  return LaunchProject<1, 2, /*kManyTiles=*/true>(args, stream);
}

}  // namespace latentd
