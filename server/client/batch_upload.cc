#include "server/client/batch_upload.h"

#include <google/protobuf/wire_format_lite.h>
#include <grpcpp/generic/generic_stub.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "server/batch/item_chain.h"

namespace latentd {
namespace {

using google::protobuf::internal::WireFormatLite;
using google::protobuf::io::CodedOutputStream;
using google::protobuf::io::StringOutputStream;

constexpr size_t kFrameBytes = 256 << 10;

grpc::ByteBuffer Encode(const std::string& bytes) {
  const grpc::Slice slice(bytes);
  return {&slice, 1};
}

// The items' own bytes in a frame: parsed and serialized again they could be others, and the chain
// is over what is sent.
class ItemsFrame {
 public:
  void Add(const std::string& item) {
    StringOutputStream stream(&items_);
    CodedOutputStream coded(&stream);
    WireFormatLite::WriteBytes(v1::CreateJobRequest::Items::kItemsFieldNumber, item, &coded);
  }
  size_t size() const { return items_.size(); }
  // The frame; then it is empty again.
  grpc::ByteBuffer Take() {
    std::string head;
    {
      StringOutputStream stream(&head);
      CodedOutputStream coded(&stream);
      coded.WriteTag(WireFormatLite::MakeTag(v1::CreateJobRequest::kItemsFieldNumber,
                                             WireFormatLite::WIRETYPE_LENGTH_DELIMITED));
      coded.WriteVarint32(static_cast<uint32_t>(items_.size()));
    }
    const grpc::Slice slices[] = {grpc::Slice(head), grpc::Slice(items_)};
    items_.clear();
    return {slices, 2};
  }

 private:
  std::string items_;
};

// One call of CreateJob whose frames are bytes. Blocks; Ctrl-C cancels it.
class CreateJobCall {
 public:
  explicit CreateJobCall(BatchClient& client)
      : stub_(client.channel()), cancel_(client.interrupts(), [this] { context_.TryCancel(); }) {
    client.Prepare(&context_);
    stream_ = stub_.PrepareCall(&context_, "/latentd.v1.BatchService/CreateJob", &queue_);
    stream_->StartCall(this);
    Wait();
  }
  ~CreateJobCall() {
    queue_.Shutdown();
    void* tag;
    bool ok;
    while (queue_.Next(&tag, &ok)) {
    }
  }

  // False: the call is over, for the reason that Finish() tells.
  bool Write(const grpc::ByteBuffer& frame) {
    stream_->Write(frame, this);
    return Wait();
  }

  // Ends the call: with what the server answers to all frames, or by cancelling it.
  grpc::Status Finish(v1::CreateJobResponse* response) {
    stream_->WritesDone(this);
    Wait();
    grpc::ByteBuffer bytes;
    stream_->Read(&bytes, this);
    const bool answered = Wait();
    const grpc::Status status = End();
    if (!status.ok() || !answered) return status;
    return grpc::SerializationTraits<v1::CreateJobResponse>::Deserialize(&bytes, response);
  }
  void Cancel() {
    context_.TryCancel();
    End();
  }

 private:
  bool Wait() {
    void* tag;
    bool ok = false;
    return queue_.Next(&tag, &ok) && ok;
  }
  grpc::Status End() {
    grpc::Status status;
    stream_->Finish(&status, this);
    Wait();
    return status;
  }

  grpc::GenericStub stub_;
  grpc::ClientContext context_;
  grpc::CompletionQueue queue_;
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> stream_;
  const OnInterrupt cancel_;
};

// One attempt. `first` items are stored and have the chain value `chain`.
class Attempt {
 public:
  Attempt(BatchClient& client, const UploadPlan& plan, BatchInput& input,
          const std::function<void(int64_t)>& on_progress)
      : client_(client), plan_(plan), input_(input), on_progress_(on_progress) {}

  grpc::Status Run(int64_t first, const std::string& stored_chain,
                   v1::CreateJobResponse* response) {
    if (grpc::Status status = Skip(first, stored_chain); !status.ok()) return status;
    CreateJobCall call(client_);
    v1::CreateJobRequest frame;
    frame.mutable_header()->set_request_id(plan_.request_id);
    *frame.mutable_header()->mutable_spec() = plan_.spec;
    frame.mutable_header()->set_first_item(first);
    // A write that fails says that the call is over; Finish() says why.
    if (call.Write(Encode(SerializeDeterministic(frame)))) {
      absl::StatusOr<bool> sent = SendItems(call, first);
      if (sent.ok() && *sent && chain_.value() != plan_.summary.chain) {
        sent = absl::AbortedError("the input was changed meanwhile");
      }
      if (!sent.ok()) {
        call.Cancel();
        return {grpc::StatusCode::ABORTED, std::string(sent.status().message())};
      }
      if (*sent) {
        frame.mutable_commit()->set_item_count(plan_.summary.num_items);
        frame.mutable_commit()->set_sha256(chain_.value());
        call.Write(Encode(SerializeDeterministic(frame)));
      }
    }
    return call.Finish(response);
  }

 private:
  // Reads over what is stored, which must be the same.
  grpc::Status Skip(int64_t first, const std::string& stored_chain) {
    input_.Rewind();
    for (int64_t i = 0; i < first; ++i) {
      const auto item = input_.Next();
      if (!item.ok()) {
        return {grpc::StatusCode::ABORTED, std::string(item.status().message())};
      }
      if (!*item) break;
      chain_.Add(**item);
    }
    if (first <= plan_.summary.num_items && chain_.value() == stored_chain) {
      return grpc::Status::OK;
    }
    return {grpc::StatusCode::ALREADY_EXISTS,
            absl::StrCat("the server has other items under the request id ", plan_.request_id)};
  }

  // False: the call is over.
  absl::StatusOr<bool> SendItems(CreateJobCall& call, int64_t num_sent) {
    ItemsFrame frame;
    while (true) {
      ASSIGN_OR_RETURN(const std::optional<std::string> item, input_.Next());
      if (item && num_sent == plan_.summary.num_items) {
        return absl::AbortedError("the input was changed meanwhile");
      }
      if (frame.size() > 0 && (!item || frame.size() + item->size() > kFrameBytes)) {
        if (!call.Write(frame.Take())) return false;
        on_progress_(num_sent);
      }
      if (!item) return true;
      chain_.Add(*item);
      frame.Add(*item);
      ++num_sent;
    }
  }

  BatchClient& client_;
  const UploadPlan& plan_;
  BatchInput& input_;
  const std::function<void(int64_t)>& on_progress_;
  ItemChain chain_;  // of the items up to here
};

// How much of the upload is stored.
grpc::Status GetStored(BatchClient& client, const std::string& request_id,
                       v1::GetUploadResponse* stored) {
  v1::GetUploadRequest request;
  request.set_request_id(request_id);
  const grpc::Status status = client.Call(&v1::BatchService::Stub::GetUpload, request, stored);
  if (status.error_code() != grpc::StatusCode::NOT_FOUND) return status;
  *stored = v1::GetUploadResponse();
  return grpc::Status::OK;
}

}  // namespace

std::string MakeRequestId(const v1::JobSpec& spec, const BatchInput::Summary& summary) {
  Sha256 sha256;
  sha256.Add(summary.chain);
  sha256.Add(SerializeDeterministic(spec));
  return absl::StrCat("latentd-batch-", HexOf(sha256.Finish()).substr(0, 32));
}

grpc::Status UploadJob(BatchClient& client, const UploadPlan& plan, BatchInput& input,
                       const std::function<void(int64_t)>& on_progress,
                       v1::CreateJobResponse* response) {
  int64_t most_stored = 0;
  while (true) {
    v1::GetUploadResponse stored;
    if (grpc::Status status = GetStored(client, plan.request_id, &stored); !status.ok()) {
      return status;
    }
    if (stored.item_count() > most_stored) client.Progressed();
    most_stored = std::max(most_stored, stored.item_count());
    on_progress(stored.item_count());
    const grpc::Status status = Attempt(client, plan, input, on_progress)
                                    .Run(stored.item_count(), stored.sha256(), response);
    if (status.ok() || !client.TryAgain(status)) return status;
  }
}

}  // namespace latentd
