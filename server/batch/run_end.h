#ifndef LATENTD_SERVER_BATCH_RUN_END_H_
#define LATENTD_SERVER_BATCH_RUN_END_H_

#include <cstdint>

#include "absl/status/status.h"
#include "latentd/v1/batch.pb.h"

namespace latentd {

// What an item's run that gave no response says of the item.
enum class RunEnd {
  kFailed,     // an error of the request: the same would come again
  kBad,        // an error of the engine, for which the item may be the reason
  kPostponed,  // nobody's fault: there was no engine, or no place
};
RunEnd JudgeRun(const absl::Status& error);

v1::ItemError ToItemError(const absl::Status& error);

// Of an item that was begun so often in vain; the last run's `error`, or OK when it is not known:
// the server ended.
v1::ItemError AttemptsExhausted(int32_t attempts, const absl::Status& error);

}  // namespace latentd

#endif  // LATENTD_SERVER_BATCH_RUN_END_H_
