// FlashInfer's FlashAttention-3 kernel for Hopper, compiled for MLA's head dims: 192 of queries and
// keys, 128 of values. Bound by FLOPs: 640 a (query, key, head). Alone in this file because its
// templates take minutes to compile.

// cutlass_utils.cuh includes the tests of CUTLASS, and those cuRAND; the attention needs this of
// it.
#define FLASHINFER_CUTLASS_UTILS_CUH_
// In this order: each uses what the ones before it declare.
// clang-format off
#include <cute/tensor.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/numeric_types.h>
#include <flashinfer/math.cuh>
#include <flashinfer/layout.cuh>
#include <flashinfer/attention/hopper/attention_updater.cuh>
#include <flashinfer/attention/hopper/variant_helper.cuh>
#include <flashinfer/attention/hopper/prefill_sm90.cuh>
#include <flashinfer/attention/hopper/variants.cuh>
#include <flashinfer/attention/hopper/default_params.cuh>
// clang-format on

#include "engine/cuda/kernels/mla_prefill.h"

namespace latentd {
namespace {

using Bf16 = cutlass::bfloat16_t;
using Params = flashinfer::BatchPrefillRaggedParams<Bf16, Bf16, Bf16, int32_t>;

template <flashinfer::MaskMode kMask>
cudaError_t Dispatch(Params& params, cudaStream_t stream) {
  return flashinfer::BatchPrefillWithRaggedKVCacheDispatched<
      192, 128, kMask, /*LEFT_SLIDING_WINDOW=*/false, /*SAME_SCHEDULE_FOR_ALL_HEADS=*/false,
      flashinfer::StandardAttention>(params, /*enable_pdl=*/false, stream);
}

// FlashInfer takes pointers to what it only reads, and its own type for bf16.
Bf16* Pointer(const __nv_bfloat16* data) {
  return reinterpret_cast<Bf16*>(const_cast<__nv_bfloat16*>(data));
}
int32_t* Pointer(const int32_t* data) { return const_cast<int32_t*>(data); }

}  // namespace

cudaError_t PrefillAttention(const PrefillAttentionArgs& args, cudaStream_t stream) {
  if (args.num_queries < 1 || args.num_rows < 1 || args.num_heads < 1 || args.q_stride % 8 != 0 ||
      args.q_stride < int64_t{192} * args.num_heads) {
    return cudaErrorInvalidValue;
  }
  Params params = {};
  params.q_ptr = Pointer(args.q);
  params.k_ptr = Pointer(args.k);
  params.v_ptr = Pointer(args.v);
  params.o_ptr = Pointer(args.out);
  params.lse_ptr = args.lse;
  params.work_indptr = Pointer(args.work.begin);
  params.head_indices = Pointer(args.work.head);
  params.qo_tile_indices = Pointer(args.work.tile);
  params.qo_indptr = Pointer(args.work.query_begin);
  params.qo_lens = Pointer(args.work.num_queries);
  params.kv_indptr = Pointer(args.work.row_begin);
  params.kv_lens = Pointer(args.work.num_keys);
  params.batch_indices =
      Pointer(args.work.head);  // read, not used without a per-sequence parameter
  params.additional_params.sm_scale = args.softmax_scale;
  params.q_stride_n = args.q_stride;
  params.q_stride_h = 192;
  params.k_stride_n = int64_t{192} * args.num_heads;
  params.k_stride_h = 192;
  params.v_stride_n = int64_t{128} * args.num_heads;
  params.v_stride_h = 128;
  params.o_stride_n = int64_t{128} * args.num_heads;
  params.o_stride_h = 128;
  params.nnz_qo = args.num_queries;
  params.nnz_kv = args.num_rows;
  params.num_qo_heads = args.num_heads;
  params.num_kv_heads = args.num_heads;
  params.group_size = 1;
  params.window_left = -1;
  params.causal = args.causal;
  return args.causal ? Dispatch<flashinfer::MaskMode::kCausal>(params, stream)
                     : Dispatch<flashinfer::MaskMode::kNone>(params, stream);
}

}  // namespace latentd
