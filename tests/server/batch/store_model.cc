#include "tests/server/batch/store_model.h"

#include <algorithm>
#include <limits>
#include <set>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "server/batch/item_chain.h"
#include "server/sha256.h"
#include "tests/server/batch/store_fixture.h"

namespace latentd {
namespace {

using absl::StatusCode;

constexpr int64_t kWindow = 3600, kTtl = 600;  // as MakeSpec()
constexpr int64_t kUploadTtl = 300;

v1::JobSpec SpecOf(int64_t priority) {
  v1::JobSpec spec = MakeSpec();
  spec.set_priority(static_cast<int32_t>(priority));
  return spec;
}

std::string OutcomeOf(v1::ItemResult result) {
  result.clear_index();
  result.clear_custom_id();
  result.clear_state();
  result.clear_attempts();
  return result.ShortDebugString();
}

// What an item gets that the job's end left without a result, as the model's outcome.
std::string EndedOutcome(v1::JobState end_state) {
  return absl::StrCat("ended by ", v1::JobState_Name(end_state));
}

std::string Shorten(const v1::ItemResult& result) {
  const std::string& reason = result.error().reason();
  if (reason == "JOB_EXPIRED") return EndedOutcome(v1::JOB_STATE_EXPIRED);
  if (reason == "JOB_CANCELLED") return EndedOutcome(v1::JOB_STATE_CANCELLED);
  if (reason == "JOB_FAILED") return EndedOutcome(v1::JOB_STATE_FAILED);
  return OutcomeOf(result);
}

}  // namespace

// ---- what it holds ---------------------------------------------------------------------------

StatusCode StoreModel::Apply(const StoreOp& op) {
  switch (op.kind) {
    case StoreOp::kUpload:
      return Upload(op);
    case StoreOp::kAppend:
      return Append(op);
    case StoreOp::kCommit:
      return Commit(op);
    case StoreOp::kStart:
      return Start(op);
    case StoreOp::kReturn:
      return Return(op);
    case StoreOp::kEnd:
      return End(op);
    case StoreOp::kEndJob:
      return EndJob(op);
    case StoreOp::kFinalize:
      return Finalize(op);
    case StoreOp::kDelete:
      return Delete(op);
    case StoreOp::kRetry:
      return Retry(op);
    case StoreOp::kPurge:
      return Purge(op);
    case StoreOp::kAbandon:
      break;
  }
  const Job* const job = Find(op.job);
  if (job != nullptr && job->state == v1::JOB_STATE_VALIDATING) jobs_.erase(op.job);
  return StatusCode::kOk;
}

void StoreModel::Reopen() {
  for (auto& [id, job] : jobs_) {
    if (job.active() && job.state != v1::JOB_STATE_QUEUED) ++job.recoveries;
  }
}

StatusCode StoreModel::Upload(const StoreOp& op) {
  if (const Job* const found = Find(op.owner, op.key)) {
    return found->retry_source == 0 && found->priority == op.number ? StatusCode::kOk
                                                                    : StatusCode::kAlreadyExists;
  }
  Job& job = jobs_[next_id_++];
  job.owner = op.owner;
  job.key = op.key;
  job.priority = static_cast<int32_t>(op.number);
  job.touched = absl::ToUnixSeconds(now_);
  return StatusCode::kOk;
}

StatusCode StoreModel::Append(const StoreOp& op) {
  Job* const job = Find(op.job);
  if (job == nullptr) return StatusCode::kNotFound;
  if (job->state != v1::JOB_STATE_VALIDATING || job->retry_source != 0 ||
      op.number != static_cast<int64_t>(job->items.size())) {
    return StatusCode::kFailedPrecondition;
  }
  for (const NewItem& item : op.items) job->items.push_back({.item = item});
  job->touched = absl::ToUnixSeconds(now_);
  return StatusCode::kOk;
}

StatusCode StoreModel::Commit(const StoreOp& op) {
  Job* const job = Find(op.job);
  if (job == nullptr) return StatusCode::kNotFound;
  if (op.number < 1 || op.number != static_cast<int64_t>(job->items.size())) {
    return StatusCode::kInvalidArgument;
  }
  if (job->state != v1::JOB_STATE_VALIDATING) return StatusCode::kOk;
  std::set<std::string> ids;
  for (const Item& item : job->items) {
    if (!ids.insert(item.item.custom_id).second) return StatusCode::kInvalidArgument;
  }
  if (job->retry_source != 0) return StatusCode::kFailedPrecondition;
  job->state = v1::JOB_STATE_QUEUED;
  job->created = absl::ToUnixSeconds(now_);
  return StatusCode::kOk;
}

StatusCode StoreModel::Start(const StoreOp& op) {
  for (const ItemStart& start : op.starts) {
    if (Find(start.job) != nullptr && !HasItem(start.job, start.index)) {
      return StatusCode::kInvalidArgument;
    }
  }
  for (const ItemStart& start : op.starts) {
    Job* const job = Find(start.job);
    if (job == nullptr) continue;
    Item& item = job->items[static_cast<size_t>(start.index)];
    if (item.state == v1::ITEM_STATE_UNSPECIFIED) {
      if (item.seed == 0) item.seed = start.seed;
      ++item.attempts;
    }
    if (job->state == v1::JOB_STATE_QUEUED) {
      job->state = v1::JOB_STATE_IN_PROGRESS;
      job->started = absl::ToUnixSeconds(now_);
    }
  }
  return StatusCode::kOk;
}

StatusCode StoreModel::Return(const StoreOp& op) {
  for (const ItemStart& start : op.starts) {
    if (Find(start.job) != nullptr && !HasItem(start.job, start.index)) {
      return StatusCode::kInvalidArgument;
    }
  }
  for (const ItemStart& start : op.starts) {
    Job* const job = Find(start.job);
    if (job == nullptr) continue;
    Item& item = job->items[static_cast<size_t>(start.index)];
    if (item.state == v1::ITEM_STATE_UNSPECIFIED && item.attempts > 0) --item.attempts;
  }
  return StatusCode::kOk;
}

StatusCode StoreModel::End(const StoreOp& op) {
  for (const ItemEnd& end : op.ends) {
    if (Find(end.job) != nullptr && !HasItem(end.job, end.result.index())) {
      return StatusCode::kInvalidArgument;
    }
  }
  for (const ItemEnd& end : op.ends) {
    Job* const job = Find(end.job);
    if (job == nullptr) continue;
    Item& item = job->items[static_cast<size_t>(end.result.index())];
    if (item.state != v1::ITEM_STATE_UNSPECIFIED) continue;
    item.state = end.result.state();
    job->results.push_back({end.result.index(), item.attempts, OutcomeOf(end.result)});
    if (item.state == v1::ITEM_STATE_SUCCEEDED) {
      job->prompt_tokens += end.prompt_tokens;
      job->completion_tokens += end.completion_tokens;
    }
    if (job->num_pending() == 0 && job->state <= v1::JOB_STATE_IN_PROGRESS) {
      job->state = v1::JOB_STATE_FINALIZING;
      job->end_state = v1::JOB_STATE_COMPLETED;
      job->finalized = absl::ToUnixSeconds(now_);
    }
  }
  return StatusCode::kOk;
}

StatusCode StoreModel::EndJob(const StoreOp& op) {
  Job* const job = Find(op.job);
  if (job == nullptr) return StatusCode::kNotFound;
  if (job->state == v1::JOB_STATE_VALIDATING) return StatusCode::kFailedPrecondition;
  if (job->state > v1::JOB_STATE_IN_PROGRESS) return StatusCode::kOk;
  job->end_state = op.end_state;
  job->state =
      op.end_state == v1::JOB_STATE_CANCELLED ? v1::JOB_STATE_CANCELLING : v1::JOB_STATE_FINALIZING;
  job->finalized = absl::ToUnixSeconds(now_);
  return StatusCode::kOk;
}

StatusCode StoreModel::Finalize(const StoreOp& op) {
  Job* const job = Find(op.job);
  if (job == nullptr) return StatusCode::kNotFound;
  if (job->has_ended()) return StatusCode::kOk;
  if (!job->active() || job->state < v1::JOB_STATE_FINALIZING) {
    return StatusCode::kFailedPrecondition;
  }
  int64_t left = op.number;
  for (size_t i = 0; i < job->items.size() && left > 0; ++i) {
    Item& item = job->items[i];
    if (item.state != v1::ITEM_STATE_UNSPECIFIED) continue;
    item.state =
        job->end_state == v1::JOB_STATE_EXPIRED ? v1::ITEM_STATE_EXPIRED : v1::ITEM_STATE_CANCELLED;
    job->results.push_back({static_cast<int64_t>(i), item.attempts, EndedOutcome(job->end_state)});
    --left;
  }
  if (job->num_pending() > 0) return StatusCode::kOk;
  job->state = job->end_state;
  job->ended = absl::ToUnixSeconds(now_);
  return StatusCode::kOk;
}

StatusCode StoreModel::Delete(const StoreOp& op) {
  const Job* const job = Find(op.job);
  if (job == nullptr) return StatusCode::kNotFound;
  if (!job->has_ended()) return StatusCode::kFailedPrecondition;
  if (op.number == 0) return StatusCode::kAborted;
  jobs_.erase(op.job);
  return StatusCode::kOk;
}

StatusCode StoreModel::BeginRetry(const StoreOp& op) {
  if (const Job* const found = Find(op.owner, op.key)) {
    return found->retry_source == op.job ? StatusCode::kOk : StatusCode::kAlreadyExists;
  }
  const Job* const source = Find(op.job);
  if (source == nullptr) return StatusCode::kNotFound;
  if (!source->has_ended() ||
      std::all_of(source->items.begin(), source->items.end(),
                  [](const Item& item) { return item.state == v1::ITEM_STATE_SUCCEEDED; })) {
    return StatusCode::kFailedPrecondition;
  }
  Job& job = jobs_[next_id_++];
  job.owner = op.owner;
  job.key = op.key;
  job.priority = source->priority;
  job.retry_source = op.job;
  job.touched = absl::ToUnixSeconds(now_);
  return StatusCode::kOk;
}

StatusCode StoreModel::Retry(const StoreOp& op) {
  const StatusCode code = BeginRetry(op);
  if (code != StatusCode::kOk) return code;
  Job* const job = Find(op.owner, op.key);
  if (job->state != v1::JOB_STATE_VALIDATING) return StatusCode::kOk;
  for (const Item& item : Find(op.job)->items) {
    if (item.state != v1::ITEM_STATE_SUCCEEDED) job->items.push_back({.item = item.item});
  }
  job->state = v1::JOB_STATE_QUEUED;
  job->created = absl::ToUnixSeconds(now_);
  return StatusCode::kOk;
}

StatusCode StoreModel::Purge(const StoreOp& op) {
  now_ += absl::Seconds(op.number);
  const int64_t now = absl::ToUnixSeconds(now_);
  std::erase_if(jobs_, [&](const auto& entry) {
    const Job& job = entry.second;
    return job.has_ended()
               ? job.ended + kTtl <= now
               : job.state == v1::JOB_STATE_VALIDATING && job.touched < now - kUploadTtl;
  });
  return StatusCode::kOk;
}

StoreModel::Job* StoreModel::Find(JobId job) {
  const auto found = jobs_.find(job);
  return found == jobs_.end() ? nullptr : &found->second;
}

StoreModel::Job* StoreModel::Find(const std::string& owner, const std::string& key) {
  for (auto& [id, job] : jobs_) {
    if (job.owner == owner && job.key == key) return &job;
  }
  return nullptr;
}

bool StoreModel::HasItem(JobId id, int64_t index) {
  const Job* const job = Find(id);
  return job != nullptr && job->state != v1::JOB_STATE_VALIDATING && index >= 0 &&
         index < static_cast<int64_t>(job->items.size());
}

// ---- what can be seen ------------------------------------------------------------------------

std::string StoreModel::Describe(JobId id, const Job& job) {
  ItemChain chain;
  std::string items, results;
  for (size_t i = 0; i < job.items.size(); ++i) {
    const Item& item = job.items[i];
    chain.Add(item.item.request);
    if (item.state != v1::ITEM_STATE_UNSPECIFIED) continue;
    absl::StrAppend(&items, "  ", i, " ", item.item.custom_id, " '", item.item.request,
                    "' attempts ", item.attempts, " seed ", item.seed, "\n");
  }
  std::map<v1::ItemState, int64_t> counts;
  for (size_t i = 0; i < job.results.size(); ++i) {
    const Result& result = job.results[i];
    const Item& item = job.items[static_cast<size_t>(result.index)];
    ++counts[item.state];
    absl::StrAppend(&results, "  ", i + 1, ": ", result.index, " ", item.item.custom_id, " ",
                    v1::ItemState_Name(item.state), " attempts ", result.attempts, " ",
                    result.outcome, "\n");
  }
  const int64_t created = job.created;
  return absl::StrCat(
             "job ", id, " ", job.owner, "/", job.key, " priority ", job.priority,
             job.retry_source == 0 ? "" : " retry", " ", v1::JobState_Name(job.state), " ",
             v1::JobState_Name(job.end_state), " total ", job.items.size(), " ",
             counts[v1::ITEM_STATE_SUCCEEDED], "/", counts[v1::ITEM_STATE_FAILED], "/",
             counts[v1::ITEM_STATE_CANCELLED], "/", counts[v1::ITEM_STATE_EXPIRED], " pending ",
             job.num_pending(), " tokens ", job.prompt_tokens, "/", job.completion_tokens,
             " recoveries ", job.recoveries, " times ", created, " ", job.started, " ",
             job.finalized, " ", job.ended, " ", created == 0 ? 0 : created + kWindow, " ",
             job.ended == 0 ? 0 : job.ended + kTtl, " chain ", HexOf(chain.value()), "\n") +
         items + results;
}

std::map<JobId, std::string> StoreModel::DescribeJobs() const {
  std::map<JobId, std::string> all;
  for (const auto& [id, job] : jobs_) all[id] = Describe(id, job);
  return all;
}

std::string StoreModel::Describe() const {
  std::string all;
  for (const auto& [id, text] : DescribeJobs()) all += text;
  return all;
}

std::map<JobId, std::string> DescribeJobs(const BatchStore& store) {
  std::map<JobId, std::string> all;
  JobFilter filter;
  for (int state = v1::JOB_STATE_VALIDATING; state <= v1::JobState_MAX; ++state) {
    filter.states.push_back(static_cast<v1::JobState>(state));
  }
  const auto jobs = store.ListJobs(filter, std::numeric_limits<int64_t>::max(), 1'000'000);
  EXPECT_TRUE(jobs.ok()) << jobs.status();
  for (const JobRecord& record : *jobs) {
    const v1::Job& job = record.job;
    const v1::JobCounts& counts = job.counts();
    const auto upload = store.GetUpload(record.owner, job.request_id());
    EXPECT_TRUE(upload.ok()) << upload.status();
    std::string& text = all[record.id];
    text =
        absl::StrCat("job ", record.id, " ", record.owner, "/", job.request_id(), " priority ",
                     job.spec().priority(), job.retry_of().empty() ? "" : " retry", " ",
                     v1::JobState_Name(job.state()), " ", v1::JobState_Name(record.end_state),
                     " total ", counts.total(), " ", counts.succeeded(), "/", counts.failed(), "/",
                     counts.cancelled(), "/", counts.expired(), " pending ", counts.pending(),
                     " tokens ", job.prompt_tokens(), "/", job.completion_tokens());
    absl::StrAppend(&text, " recoveries ", job.recoveries(), " times ", job.create_time().seconds(),
                    " ", job.start_time().seconds(), " ", job.finalize_time().seconds(), " ",
                    job.end_time().seconds(), " ", job.expire_time().seconds(), " ",
                    job.purge_time().seconds(), " chain ", HexOf(upload->sha256), "\n");
    EXPECT_EQ(*store.ChainOf(record.id, 0), "");
    const auto items = store.ReadPending(record.id, 0, 1'000'000, int64_t{1} << 40);
    EXPECT_TRUE(items.ok()) << items.status();
    for (const PendingItem& item : *items) {
      absl::StrAppend(&text, "  ", item.index, " ", item.custom_id, " '", item.request,
                      "' attempts ", item.attempts, " seed ", item.seed, "\n");
    }
    const auto results = store.ReadResults(record.id, 0, 1'000'000, int64_t{1} << 40);
    EXPECT_TRUE(results.ok()) << results.status();
    for (const BatchStore::Result& result : *results) {
      absl::StrAppend(&text, "  ", result.sequence, ": ", result.result.index(), " ",
                      result.result.custom_id(), " ", v1::ItemState_Name(result.result.state()),
                      " attempts ", result.result.attempts(), " ", Shorten(result.result), "\n");
    }
  }
  return all;
}

std::string Describe(const BatchStore& store) {
  std::string all;
  for (const auto& [id, text] : DescribeJobs(store)) all += text;
  return all;
}

// ---- what is asked ---------------------------------------------------------------------------

JobId StoreModel::PickJob(std::mt19937_64* random) const {
  if (jobs_.empty() || (*random)() % 30 == 0) {  // often one that is gone
    return 1 + static_cast<JobId>((*random)() % static_cast<uint64_t>(next_id_ + 1));
  }
  auto job = jobs_.begin();
  std::advance(job, (*random)() % jobs_.size());
  return job->first;
}

StoreOp StoreModel::MakeOp(std::mt19937_64* random) const {
  const auto below = [&](int64_t bound) {
    return static_cast<int64_t>((*random)() % static_cast<uint64_t>(bound));
  };
  constexpr StoreOp::Kind kKinds[] = {
      StoreOp::kUpload, StoreOp::kUpload,   StoreOp::kAppend,   StoreOp::kAppend, StoreOp::kAppend,
      StoreOp::kCommit, StoreOp::kCommit,   StoreOp::kStart,    StoreOp::kStart,  StoreOp::kStart,
      StoreOp::kReturn, StoreOp::kEnd,      StoreOp::kEnd,      StoreOp::kEnd,    StoreOp::kEnd,
      StoreOp::kEnd,    StoreOp::kFinalize, StoreOp::kFinalize, StoreOp::kRetry};
  StoreOp op;
  op.kind = kKinds[below(std::size(kKinds))];
  if (below(12) == 0) {
    constexpr StoreOp::Kind kRare[] = {StoreOp::kAbandon, StoreOp::kEndJob, StoreOp::kDelete,
                                       StoreOp::kPurge};
    op.kind = kRare[below(std::size(kRare))];
  }
  op.owner = below(3) == 0 ? "bob" : "ann";
  op.key = absl::StrCat("key-", below(12));
  op.job = PickJob(random);
  const auto found = jobs_.find(op.job);
  const auto num_items =
      found == jobs_.end() ? 3 : static_cast<int64_t>(found->second.items.size());
  const bool wrong = below(15) == 0;
  switch (op.kind) {
    case StoreOp::kUpload:
      op.number = wrong ? 1 : 0;
      break;
    case StoreOp::kAppend:
      op.number = wrong ? below(num_items + 2) : num_items;
      for (int64_t i = 0, count = 1 + below(12); i < count; ++i) {
        op.items.push_back(MakeItem(op.number + i));
        op.items.back().request.resize(10 + static_cast<size_t>(below(900)), '.');
      }
      if (below(20) == 0) op.items.back().custom_id = "id-0";
      break;
    case StoreOp::kCommit:
      op.number = wrong ? below(num_items + 2) : num_items;
      break;
    case StoreOp::kStart:
    case StoreOp::kReturn:
      for (int64_t i = 0, count = 1 + below(4); i < count; ++i) {
        op.starts.push_back(
            {.job = i == 0 ? op.job : PickJob(random),
             .index = below(i == 0 ? std::max<int64_t>(num_items, 1) + (wrong ? 2 : 0) : 2),
             .seed = 1 + static_cast<uint64_t>(below(1'000'000))});
      }
      break;
    case StoreOp::kEnd:
      for (int64_t i = 0, count = 1 + below(8); i < count; ++i) {
        const int64_t index = below(std::max<int64_t>(num_items, 1) + (wrong ? 2 : 0));
        op.ends.push_back(below(4) == 0 ? Fail(op.job, index) : Succeed(op.job, index));
      }
      break;
    case StoreOp::kEndJob:
      op.end_state = static_cast<v1::JobState>(v1::JOB_STATE_FAILED + below(3));
      break;
    case StoreOp::kFinalize:
      op.number = 1 + below(20);
      break;
    case StoreOp::kDelete:
      op.number = wrong ? 0 : 1;
      break;
    case StoreOp::kPurge:
      op.number = below(200);
      break;
    case StoreOp::kAbandon:
    case StoreOp::kRetry:
      break;
  }
  return op;
}

bool WantsAnswers(const StoreOp& op) {
  return op.kind == StoreOp::kCommit || op.kind == StoreOp::kDelete || op.kind == StoreOp::kRetry ||
         op.kind == StoreOp::kPurge;
}

void Ask(const StoreOp& op, absl::Time now, BatchStore* store, BatchStore::Done done) {
  switch (op.kind) {
    case StoreOp::kAppend:
      return store->AppendItems(op.job, op.number, op.items, std::move(done));
    case StoreOp::kStart:
      return store->StartItems(op.starts, std::move(done));
    case StoreOp::kReturn:
      return store->ReturnItems(op.starts, std::move(done));
    case StoreOp::kEnd:
      return store->EndItems(op.ends, std::move(done));
    case StoreOp::kUpload:
      return done(store->OpenUpload(op.owner, op.key, SpecOf(op.number)).status());
    case StoreOp::kCommit:
      return done(store->CommitUpload(op.job, op.number, 5).status());
    case StoreOp::kAbandon:
      return done(store->AbandonUpload(op.job));
    case StoreOp::kEndJob:
      return done(store->EndJob(op.job, op.end_state, "").status());
    case StoreOp::kFinalize:
      return done(store->FinalizeSome(op.job, op.number).status());
    case StoreOp::kRetry:
      return done(store->RetryJob(op.job, op.owner, op.key).status());
    case StoreOp::kDelete: {
      const auto job = store->GetJob(op.job);
      const std::string etag = op.number == 0 ? "another" : job.ok() ? job->job.etag() : "";
      return done(store->DeleteJob(op.job, etag));
    }
    case StoreOp::kPurge:
      return done(store->Purge(now - absl::Seconds(kUploadTtl)).status());
  }
}

}  // namespace latentd
