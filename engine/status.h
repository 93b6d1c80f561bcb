#ifndef LATENTD_ENGINE_STATUS_H_
#define LATENTD_ENGINE_STATUS_H_

#include <cstdio>
#include <cstdlib>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

// Returns from the enclosing function when `expr` is not OK.
//   RETURN_IF_ERROR(checkpoint->Validate(config));
#define RETURN_IF_ERROR(expr)                                                                \
  do {                                                                                       \
    if (::absl::Status latentd_status = (expr); !latentd_status.ok()) return latentd_status; \
  } while (false)

// Assigns the value of a StatusOr, or returns its error.
//   ASSIGN_OR_RETURN(ModelConfig config, LoadModelConfig(dir));
#define ASSIGN_OR_RETURN(lhs, expr) \
  LATENTD_ASSIGN_OR_RETURN_(LATENTD_CONCAT_(latentd_statusor_, __LINE__), lhs, expr)
#define LATENTD_ASSIGN_OR_RETURN_(tmp, lhs, expr) \
  auto tmp = (expr);                              \
  if (!tmp.ok()) return std::move(tmp).status();  \
  lhs = *std::move(tmp)
#define LATENTD_CONCAT_(a, b) LATENTD_CONCAT_INNER_(a, b)
#define LATENTD_CONCAT_INNER_(a, b) a##b

// Aborts with the place and the condition when one of our own invariants does not hold. Never for
// what a client, a file or the network can cause: those are a Status.
#define LATENTD_CHECK(condition)                                                         \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "%s:%d: check failed: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                      \
    }                                                                                    \
  } while (false)

#endif  // LATENTD_ENGINE_STATUS_H_
