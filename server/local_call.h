#ifndef LATENTD_SERVER_LOCAL_CALL_H_
#define LATENTD_SERVER_LOCAL_CALL_H_

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/generation_call.h"
#include "server/local_caller.h"

namespace latentd {

// A call of this process. `Response` is ChatResponse or CompleteResponse. The observer hears
// nothing of it.
template <typename Response>
class LocalCall final : public WholeCall<Response, GenerationCall> {
 public:
  LocalCall(CallHost* host, LocalCaller::Done done)
      : WholeCall<Response, GenerationCall>(host), done_(std::move(done)) {}

 private:
  // The first end counts, so `done_` is called once. It may drop the service's hold of the call.
  void Respond(Response response) override { Tell(LocalResponse(std::move(response))); }
  void Close(const absl::Status& status) override { Tell(status); }

  void Tell(absl::StatusOr<LocalResponse> response) {
    std::exchange(done_, nullptr)(std::move(response));
  }

  LocalCaller::Done done_;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_LOCAL_CALL_H_
