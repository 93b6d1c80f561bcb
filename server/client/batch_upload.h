#ifndef LATENTD_SERVER_CLIENT_BATCH_UPLOAD_H_
#define LATENTD_SERVER_CLIENT_BATCH_UPLOAD_H_

#include <cstdint>
#include <functional>
#include <string>

#include "latentd/v1/batch.pb.h"
#include "server/client/batch_client.h"
#include "server/client/batch_input.h"

namespace latentd {

// What is uploaded.
struct UploadPlan {
  std::string request_id;
  v1::JobSpec spec;
  BatchInput::Summary summary;  // of the input
};

// The key of a job that is made of this spec and these items: who sends the same again gets the
// same job, and goes on with the upload of it.
std::string MakeRequestId(const v1::JobSpec& spec, const BatchInput::Summary& summary);

// Brings a job to the server: begins where an earlier upload of this request_id stopped, goes on
// when the connection breaks or the server starts anew, until it is committed. Sends the items'
// bytes as the input gives them, some hundred kilobytes a message; holds no more of them.
// `on_progress` is told how many items were sent.
grpc::Status UploadJob(BatchClient& client, const UploadPlan& plan, BatchInput& input,
                       const std::function<void(int64_t)>& on_progress,
                       v1::CreateJobResponse* response);

}  // namespace latentd

#endif  // LATENTD_SERVER_CLIENT_BATCH_UPLOAD_H_
