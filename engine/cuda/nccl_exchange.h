#ifndef LATENTD_ENGINE_CUDA_NCCL_EXCHANGE_H_
#define LATENTD_ENGINE_CUDA_NCCL_EXCHANGE_H_

#include "engine/cuda/gpu_exchange.h"

namespace latentd {

// The exchange over NCCL: an all-gather of the slots, a reduce-scatter of the sums in bf16.
ExchangeFactory NcclExchanges();

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_NCCL_EXCHANGE_H_
