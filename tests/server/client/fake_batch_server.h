#ifndef LATENTD_TESTS_SERVER_CLIENT_FAKE_BATCH_SERVER_H_
#define LATENTD_TESTS_SERVER_CLIENT_FAKE_BATCH_SERVER_H_

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "latentd/v1/batch.grpc.pb.h"
#include "server/batch/item_chain.h"

namespace latentd {

// A BatchService in memory that keeps what batch.proto promises of uploads, and lets a test break
// off its calls. Jobs do not run: a test says what they are. Any thread.
class FakeBatchServer final : public v1::BatchService::Service {
 public:
  explicit FakeBatchServer(int port = 0);
  ~FakeBatchServer() override;

  std::string target() const { return "127.0.0.1:" + std::to_string(port_); }
  int port() const { return port_; }
  // As a kill would: the port is closed, calls break. Jobs and uploads stay; Start() goes on.
  void Stop();
  void Start();

  // Of an upload: what is stored.
  struct Upload {
    v1::JobSpec spec;
    std::vector<v1::BatchItem> items;
    ItemChain chain;
    std::string job;  // name, once committed
  };

  // ---- what a test says, under lock() ----
  std::unique_lock<std::mutex> lock() { return std::unique_lock(mutex_); }
  std::map<std::string, Upload> uploads;  // by request_id
  std::map<std::string, v1::Job> jobs;    // by name
  std::vector<v1::ItemResult> results;    // of every job
  // Breaks an upload with UNAVAILABLE after each so many items; 0: never.
  int break_after_items = 0;
  // What a commit answers instead.
  grpc::Status commit_status;
  // The states that WatchJob tells, one call each; then the job's own.
  std::vector<std::vector<v1::Job>> watched;
  // Breaks a stream of results after so many; 0: never.
  int break_after_results = 0;
  int results_per_response = 2;

  // ---- what came in ----
  std::vector<int64_t> first_items;  // of the CreateJob calls
  std::vector<std::string> owners;   // of all calls that had one
  std::vector<v1::RetryJobRequest> retries;
  std::vector<v1::ListJobsRequest> lists;
  std::vector<v1::DeleteJobRequest> deletes;

 private:
  using Context = grpc::ServerContext;
  grpc::Status CreateJob(Context* context, grpc::ServerReader<v1::CreateJobRequest>* reader,
                         v1::CreateJobResponse* response) override;
  grpc::Status GetUpload(Context*, const v1::GetUploadRequest* request,
                         v1::GetUploadResponse* response) override;
  grpc::Status GetJob(Context* context, const v1::GetJobRequest* request,
                      v1::GetJobResponse* response) override;
  grpc::Status ListJobs(Context*, const v1::ListJobsRequest* request,
                        v1::ListJobsResponse* response) override;
  grpc::Status WatchJob(Context*, const v1::WatchJobRequest* request,
                        grpc::ServerWriter<v1::WatchJobResponse>* writer) override;
  grpc::Status CancelJob(Context*, const v1::CancelJobRequest* request,
                         v1::CancelJobResponse* response) override;
  grpc::Status DeleteJob(Context*, const v1::DeleteJobRequest* request,
                         v1::DeleteJobResponse*) override;
  grpc::Status StreamResults(Context*, const v1::StreamResultsRequest* request,
                             grpc::ServerWriter<v1::StreamResultsResponse>* writer) override;
  grpc::Status RetryJob(Context*, const v1::RetryJobRequest* request,
                        v1::RetryJobResponse* response) override;

  void NoteOwner(const Context& context);

  std::mutex mutex_;
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
};

// A job of that name and state with these counts.
v1::Job MakeJob(const std::string& name, v1::JobState state, int64_t total, int64_t succeeded,
                int64_t revision = 1);

}  // namespace latentd

#endif  // LATENTD_TESTS_SERVER_CLIENT_FAKE_BATCH_SERVER_H_
