#include "tests/server/client/fake_batch_server.h"

#include <algorithm>
#include <utility>

#include "engine/status.h"

namespace latentd {
namespace {

grpc::Status NotFound() { return {grpc::StatusCode::NOT_FOUND, "there is no such job"}; }
grpc::Status Broken() { return {grpc::StatusCode::UNAVAILABLE, "broken by the test"}; }

}  // namespace

FakeBatchServer::FakeBatchServer(int port) : port_(port) { Start(); }

FakeBatchServer::~FakeBatchServer() { Stop(); }

void FakeBatchServer::Start() {
  grpc::ServerBuilder builder;
  builder.AddListeningPort("127.0.0.1:" + std::to_string(port_), grpc::InsecureServerCredentials(),
                           &port_);
  builder.RegisterService(this);
  server_ = builder.BuildAndStart();
  LATENTD_CHECK(server_ != nullptr && port_ > 0);
}

void FakeBatchServer::Stop() {
  if (server_ != nullptr) server_->Shutdown(std::chrono::system_clock::now());
  server_.reset();
}

void FakeBatchServer::NoteOwner(const Context& context) {
  const auto it = context.client_metadata().find("latentd-owner");
  if (it != context.client_metadata().end()) {
    owners.emplace_back(it->second.data(), it->second.size());
  }
}

grpc::Status FakeBatchServer::CreateJob(Context* context,
                                        grpc::ServerReader<v1::CreateJobRequest>* reader,
                                        v1::CreateJobResponse* response) {
  v1::CreateJobRequest frame;
  if (!reader->Read(&frame) || !frame.has_header()) {
    return {grpc::StatusCode::INVALID_ARGUMENT, "no header"};
  }
  const v1::CreateJobRequest::Header header = frame.header();
  {
    const auto held = lock();
    NoteOwner(*context);
    first_items.push_back(header.first_item());
    Upload& upload = uploads[header.request_id()];
    if (header.first_item() > static_cast<int64_t>(upload.items.size())) {
      return {grpc::StatusCode::INVALID_ARGUMENT, "first_item is beyond what is stored"};
    }
    upload.spec = header.spec();
  }
  int64_t index = header.first_item();
  int num_new = 0;
  while (reader->Read(&frame)) {
    const auto held = lock();
    Upload& upload = uploads[header.request_id()];
    for (const v1::BatchItem& item : frame.items().items()) {
      if (index++ < static_cast<int64_t>(upload.items.size())) continue;
      if (break_after_items > 0 && num_new == break_after_items) return Broken();
      upload.items.push_back(item);
      // Without maps a message has one serialization.
      upload.chain.Add(item.SerializeAsString());
      ++num_new;
    }
    if (!frame.has_commit()) continue;
    if (!commit_status.ok()) return std::exchange(commit_status, grpc::Status::OK);
    if (frame.commit().item_count() != static_cast<int64_t>(upload.items.size()) ||
        frame.commit().sha256() != upload.chain.value()) {
      return {grpc::StatusCode::INVALID_ARGUMENT, "count or chain is another"};
    }
    response->set_already_existed(!upload.job.empty());
    if (upload.job.empty()) {
      upload.job = "jobs/" + HexOf(Sha256::Of(header.request_id())).substr(0, 32);
      jobs[upload.job] =
          MakeJob(upload.job, v1::JOB_STATE_QUEUED, static_cast<int64_t>(upload.items.size()), 0);
      jobs[upload.job].set_request_id(header.request_id());
    }
    *response->mutable_job() = jobs[upload.job];
    return grpc::Status::OK;
  }
  return {grpc::StatusCode::INVALID_ARGUMENT, "no commit"};
}

grpc::Status FakeBatchServer::GetUpload(Context*, const v1::GetUploadRequest* request,
                                        v1::GetUploadResponse* response) {
  const auto held = lock();
  const auto it = uploads.find(request->request_id());
  if (it == uploads.end()) return NotFound();
  response->set_item_count(static_cast<int64_t>(it->second.items.size()));
  response->set_sha256(it->second.chain.value());
  if (!it->second.job.empty()) *response->mutable_job() = jobs[it->second.job];
  return grpc::Status::OK;
}

grpc::Status FakeBatchServer::GetJob(Context* context, const v1::GetJobRequest* request,
                                     v1::GetJobResponse* response) {
  const auto held = lock();
  NoteOwner(*context);
  const auto it = jobs.find(request->name());
  if (it == jobs.end()) return NotFound();
  *response->mutable_job() = it->second;
  return grpc::Status::OK;
}

grpc::Status FakeBatchServer::ListJobs(Context*, const v1::ListJobsRequest* request,
                                       v1::ListJobsResponse* response) {
  const auto held = lock();
  lists.push_back(*request);
  // A page's token is the name that it ended with.
  for (auto it = jobs.upper_bound(request->page_token()); it != jobs.end(); ++it) {
    if (response->jobs_size() == request->page_size()) {
      response->set_next_page_token(response->jobs(response->jobs_size() - 1).name());
      break;
    }
    *response->add_jobs() = it->second;
  }
  return grpc::Status::OK;
}

grpc::Status FakeBatchServer::WatchJob(Context*, const v1::WatchJobRequest* request,
                                       grpc::ServerWriter<v1::WatchJobResponse>* writer) {
  std::vector<v1::Job> told;
  bool is_last = false;
  {
    const auto held = lock();
    if (!jobs.contains(request->name())) return NotFound();
    is_last = watched.empty();
    if (is_last) {
      told.push_back(jobs[request->name()]);
    } else {
      told = std::move(watched.front());
      watched.erase(watched.begin());
    }
  }
  for (v1::Job& job : told) {
    if (job.revision() <= request->from_revision()) continue;
    v1::WatchJobResponse response;
    *response.mutable_job() = std::move(job);
    writer->Write(response);
  }
  return is_last ? grpc::Status::OK : Broken();
}

grpc::Status FakeBatchServer::CancelJob(Context*, const v1::CancelJobRequest* request,
                                        v1::CancelJobResponse* response) {
  const auto held = lock();
  const auto it = jobs.find(request->name());
  if (it == jobs.end()) return NotFound();
  it->second.set_state(v1::JOB_STATE_CANCELLING);
  *response->mutable_job() = it->second;
  return grpc::Status::OK;
}

grpc::Status FakeBatchServer::DeleteJob(Context*, const v1::DeleteJobRequest* request,
                                        v1::DeleteJobResponse*) {
  const auto held = lock();
  deletes.push_back(*request);
  return jobs.erase(request->name()) > 0 ? grpc::Status::OK : NotFound();
}

grpc::Status FakeBatchServer::StreamResults(Context*, const v1::StreamResultsRequest* request,
                                            grpc::ServerWriter<v1::StreamResultsResponse>* writer) {
  const auto held = lock();
  size_t next = request->cursor().empty() ? 0 : std::stoul(request->cursor());
  for (int num_sent = 0; next < results.size();) {
    v1::StreamResultsResponse response;
    for (int i = 0; i < results_per_response && next < results.size(); ++i, ++num_sent) {
      *response.add_results() = results[next++];
    }
    response.set_cursor(std::to_string(next));
    writer->Write(response);
    if (break_after_results > 0 && num_sent >= break_after_results) return Broken();
  }
  return grpc::Status::OK;
}

grpc::Status FakeBatchServer::RetryJob(Context*, const v1::RetryJobRequest* request,
                                       v1::RetryJobResponse* response) {
  const auto held = lock();
  retries.push_back(*request);
  if (!jobs.contains(request->name())) return NotFound();
  const std::string name = "jobs/" + HexOf(Sha256::Of(request->request_id())).substr(0, 32);
  response->set_already_existed(jobs.contains(name));
  v1::Job& job = jobs[name];
  job.set_name(name);
  job.set_state(v1::JOB_STATE_QUEUED);
  job.set_retry_of(request->name());
  *response->mutable_job() = job;
  return grpc::Status::OK;
}

v1::Job MakeJob(const std::string& name, v1::JobState state, int64_t total, int64_t succeeded,
                int64_t revision) {
  v1::Job job;
  job.set_name(name);
  job.set_state(state);
  job.set_revision(revision);
  job.mutable_counts()->set_total(total);
  job.mutable_counts()->set_succeeded(succeeded);
  job.mutable_counts()->set_pending(total - succeeded);
  job.mutable_create_time()->set_seconds(1'700'000'000);
  return job;
}

}  // namespace latentd
