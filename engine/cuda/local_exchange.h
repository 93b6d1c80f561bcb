#ifndef LATENTD_ENGINE_CUDA_LOCAL_EXCHANGE_H_
#define LATENTD_ENGINE_CUDA_LOCAL_EXCHANGE_H_

#include <memory>

#include "engine/cuda/gpu_exchange.h"

namespace latentd {

// The exchange of ranks that are threads of one process and share one GPU: a group as large as the
// deployment's, on a machine that has one GPU. Eager steps only. No kernel waits for another rank's
// (they could not all run at once): each thread waits for its own stream, then for the other
// threads, and copies or adds what they have. Sums are f32 in rank order, rounded to bf16 once.
//
// The factory for all ranks of a group; each call is one rank's. It makes a new exchange for each
// GroupSpec::epoch. Thread-safe.
ExchangeFactory LocalExchanges();

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_LOCAL_EXCHANGE_H_
