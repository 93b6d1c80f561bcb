#include "server/batch/batch_runner.h"

#include <atomic>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/batch/batch_store.h"
#include "server/status.h"
#include "tests/server/batch/fake_caller.h"
#include "tests/server/batch/store_fixture.h"

namespace latentd {
namespace {

using ::testing::ElementsAre;
using ::testing::SizeIs;

absl::Status EngineFailed() {
  return MakeError(absl::StatusCode::kUnavailable, "ENGINE_FAILED", "the engine failed: broken");
}

// A store, a runner and a caller that the test answers for.
class BatchRunnerTest : public ::testing::Test {
 protected:
  BatchRunnerTest() : caller_(4) { OpenStore(); }

  void OpenStore() {
    auto store = BatchStore::Open({.directory = folder_.path(),
                                   .on_change =
                                       [this](const std::vector<JobId>& jobs) {
                                         absl::MutexLock lock(&mutex_);
                                         if (runner_ != nullptr) runner_->OnChange(jobs);
                                       },
                                   .now = [this] { return Now(); }});
    ASSERT_TRUE(store.ok()) << store.status();
    store_ = *std::move(store);
  }

  void Run(BatchRunner::Options options = {}) {
    if (options.retry_delay == absl::Seconds(1)) options.retry_delay = absl::Milliseconds(1);
    options.now = [this] { return Now(); };
    auto runner = std::make_unique<BatchRunner>(store_.get(), &caller_, options);
    absl::MutexLock lock(&mutex_);
    runner_ = std::move(runner);
  }

  void StopRunner() {
    std::unique_ptr<BatchRunner> runner;
    {
      absl::MutexLock lock(&mutex_);
      runner = std::move(runner_);
    }
  }

  ~BatchRunnerTest() override { StopRunner(); }

  absl::Time Now() const { return absl::Now() + absl::Nanoseconds(skew_ns_.load()); }
  void Pass(absl::Duration time) { skew_ns_ += absl::ToInt64Nanoseconds(time); }

  // A job of items whose prompts are NAME-0, NAME-1, ...
  JobRecord NewJob(const std::string& name, int64_t count, v1::JobSpec spec = MakeSpec()) {
    const auto upload = store_->OpenUpload("ann", name, spec);
    EXPECT_TRUE(upload.ok()) << upload.status();
    std::vector<NewItem> items;
    for (int64_t i = 0; i < count; ++i) {
      v1::BatchItem item;
      item.set_custom_id(absl::StrCat(name, "-", i));
      item.mutable_complete()->set_text(item.custom_id());
      items.push_back({.custom_id = item.custom_id(), .request = item.SerializeAsString()});
    }
    EXPECT_TRUE(Append(store_.get(), upload->record.id, 0, std::move(items)).ok());
    const auto job = store_->CommitUpload(upload->record.id, count, 10);
    EXPECT_TRUE(job.ok()) << job.status();
    return *job;
  }

  v1::Job AwaitState(JobId id, v1::JobState state) {
    v1::Job job;
    const bool reached = Eventually([&] {
      job = store_->GetJob(id)->job;
      return job.state() == state;
    });
    EXPECT_TRUE(reached) << job.ShortDebugString();
    return job;
  }

  static bool Eventually(const std::function<bool()>& condition) {
    for (int i = 0; i < 6000; ++i) {
      if (condition()) return true;
      absl::SleepFor(absl::Milliseconds(5));
    }
    return false;
  }

  std::map<int64_t, v1::ItemResult> Results(JobId job) {
    const auto results = store_->ReadResults(job, 0, 1'000'000, int64_t{1} << 40);
    EXPECT_TRUE(results.ok()) << results.status();
    std::map<int64_t, v1::ItemResult> by_index;
    for (const BatchStore::Result& result : *results) {
      EXPECT_TRUE(by_index.emplace(result.result.index(), result.result).second) << "told twice";
    }
    return by_index;
  }

  StoreFolder folder_;
  std::atomic<int64_t> skew_ns_ = 0;
  FakeCaller caller_;
  absl::Mutex mutex_;
  std::unique_ptr<BatchStore> store_;
  std::unique_ptr<BatchRunner> runner_;  // changed under mutex_; before the store at the end
};

TEST_F(BatchRunnerTest, RunsAJobToItsEnd) {
  const JobId job = NewJob("a", 100).id;
  Run();
  caller_.AnswerAll();
  const v1::Job done = AwaitState(job, v1::JOB_STATE_COMPLETED);
  EXPECT_EQ(done.counts().succeeded(), 100);
  EXPECT_EQ(done.prompt_tokens(), 300);
  EXPECT_EQ(done.completion_tokens(), 500);
  const auto results = Results(job);
  ASSERT_THAT(results, SizeIs(100));
  for (const auto& [index, result] : results) {
    EXPECT_EQ(result.complete().choices(0).message().content(), absl::StrCat("a-", index, "!"));
    EXPECT_EQ(result.attempts(), 1);
    EXPECT_NE(result.complete().seed(), 0u);
  }
  EXPECT_EQ(runner_->num_running(), 0);
}

TEST_F(BatchRunnerTest, TakesJobsThatComeWhileItRuns) {
  Run();
  caller_.AnswerAll();
  AwaitState(NewJob("a", 3).id, v1::JOB_STATE_COMPLETED);
  AwaitState(NewJob("b", 3).id, v1::JOB_STATE_COMPLETED);
}

TEST_F(BatchRunnerTest, KeepsAsManyInTheEngineAsItTakesAndAnEighth) {
  caller_.set_capacity(16);
  const JobId job = NewJob("a", 100).id;
  Run();
  EXPECT_THAT(caller_.Await(18), SizeIs(18));
  EXPECT_EQ(runner_->num_running(job), 18);
  EXPECT_EQ(store_->GetJob(job)->job.state(), v1::JOB_STATE_IN_PROGRESS);
  caller_.AnswerAll();
  AwaitState(job, v1::JOB_STATE_COMPLETED);
  EXPECT_EQ(caller_.max_calls(), 18u);
}

TEST_F(BatchRunnerTest, RequestsInTheEngineAreBoundedInBytesButForOne) {
  const JobId job = NewJob("a", 5).id;
  Run({.max_running_bytes = 1});
  caller_.Await(1);
  absl::SleepFor(absl::Milliseconds(50));
  EXPECT_EQ(caller_.num_calls(), 1u);
  caller_.AnswerAll();
  AwaitState(job, v1::JOB_STATE_COMPLETED);
  EXPECT_EQ(caller_.max_calls(), 1u);
}

TEST_F(BatchRunnerTest, JobsOfOnePriorityHoldAsManyPlacesHigherOnesGoFirst) {
  v1::JobSpec urgent = MakeSpec();
  urgent.set_priority(5);
  caller_.set_capacity(0);
  const JobId a = NewJob("a", 1000).id, b = NewJob("b", 1000).id, c = NewJob("c", 4, urgent).id;
  Run({.max_running = 10});
  caller_.set_capacity(1);
  caller_.Await(10);
  EXPECT_EQ(runner_->num_running(c), 4);
  EXPECT_EQ(runner_->num_running(a), 3);
  EXPECT_EQ(runner_->num_running(b), 3);
  for (const LocalCaller::Options& options : caller_.options()) {
    EXPECT_TRUE(options.priority == 0 || options.priority == 5);
  }
  // However long the items of one take, both hold as many.
  for (int i = 0; i < 40; ++i) {
    size_t n = 0;
    const std::vector<std::string> prompts = caller_.Await(10);
    while (n < prompts.size() && prompts[n][0] == 'a') ++n;
    ASSERT_TRUE(caller_.AnswerOne(n < prompts.size() ? n : 0));
  }
  caller_.Await(10);
  EXPECT_EQ(runner_->num_running(a), 5);
  EXPECT_EQ(runner_->num_running(b), 5);
}

TEST_F(BatchRunnerTest, AnErrorOfTheRequestIsTheItemsEnd) {
  caller_.set_judge([](const std::string& prompt) {
    return prompt == "a-1" ? MakeBadRequest({{"sampling.top_p", "is 2"}}) : absl::OkStatus();
  });
  const JobId job = NewJob("a", 3).id;
  Run();
  caller_.AnswerAll();
  const v1::Job done = AwaitState(job, v1::JOB_STATE_COMPLETED);
  EXPECT_EQ(done.counts().succeeded(), 2);
  EXPECT_EQ(done.counts().failed(), 1);
  const v1::ItemResult result = Results(job)[1];
  EXPECT_EQ(result.state(), v1::ITEM_STATE_FAILED);
  EXPECT_EQ(result.error().reason(), "INVALID_FIELD");
  EXPECT_EQ(result.error().code(), 3);
  EXPECT_EQ(caller_.num_begun("a-1"), 1);
}

TEST_F(BatchRunnerTest, APoisonItemFailsAfterItsAttemptsAndRunsAloneAtLast) {
  v1::JobSpec spec = MakeSpec();
  spec.set_max_attempts_per_item(4);
  std::atomic<int> num_beside = 0, num_alone = 0;
  caller_.set_judge([&](const std::string& prompt) {
    if (prompt != "a-7") return absl::OkStatus();
    ++(runner_->num_running() == 1 ? num_alone : num_beside);
    return EngineFailed();
  });
  const JobId job = NewJob("a", 60, spec).id;
  Run({.max_running = 8});
  for (int i = 0; i < 2000 && store_->GetJob(job)->job.state() != v1::JOB_STATE_COMPLETED; ++i) {
    while (caller_.AnswerOne(caller_.num_calls() / 2)) {
      absl::SleepFor(absl::Microseconds(300));
    }
    absl::SleepFor(absl::Milliseconds(1));
  }
  const v1::Job done = AwaitState(job, v1::JOB_STATE_COMPLETED);
  EXPECT_EQ(done.counts().succeeded(), 59);
  const v1::ItemResult result = Results(job)[7];
  EXPECT_EQ(result.state(), v1::ITEM_STATE_FAILED);
  EXPECT_EQ(result.attempts(), 4);
  EXPECT_EQ(result.error().reason(), "ATTEMPTS_EXHAUSTED");
  EXPECT_THAT(result.error().message(), testing::HasSubstr("broken"));
  EXPECT_EQ(caller_.num_begun("a-7"), 4);
  EXPECT_GE(num_alone, 2);  // the third and the fourth time, at least
  EXPECT_EQ(num_alone + num_beside, 4);
}

TEST_F(BatchRunnerTest, WhatIsNobodysFaultDoesNotCount) {
  std::atomic<int> num_refused = 0;
  caller_.set_judge([&](const std::string&) {
    if (num_refused >= 30) return absl::OkStatus();
    ++num_refused;
    return MakeError(absl::StatusCode::kUnavailable, "ENGINE_UNAVAILABLE", "not ready");
  });
  v1::JobSpec spec = MakeSpec();
  spec.set_max_attempts_per_item(1);
  const JobId job = NewJob("a", 4, spec).id;
  Run();
  caller_.AnswerAll();
  const v1::Job done = AwaitState(job, v1::JOB_STATE_COMPLETED);
  EXPECT_EQ(done.counts().succeeded(), 4);
  for (const auto& [index, result] : Results(job)) EXPECT_EQ(result.attempts(), 1);
}

TEST_F(BatchRunnerTest, TheSeedIsThatOfTheFirstAttempt) {
  std::set<uint64_t> seeds;
  const JobId job = NewJob("a", 1).id;
  Run();
  for (int i = 0; i < 3; ++i) {
    caller_.Await(1);
    seeds.insert(caller_.options()[0].seed);
    StopRunner();
    caller_.Hold();
    Run();
  }
  caller_.AnswerAll();
  AwaitState(job, v1::JOB_STATE_COMPLETED);
  EXPECT_THAT(seeds, ElementsAre(Results(job)[0].complete().seed()));
}

TEST_F(BatchRunnerTest, ACancelledJobEndsWhenNothingOfItRuns) {
  const JobId job = NewJob("a", 5000).id, other = NewJob("b", 3).id;
  Run({.max_running = 6});
  caller_.Await(6);
  caller_.AnswerOne();
  ASSERT_TRUE(store_->EndJob(job, v1::JOB_STATE_CANCELLED, "").ok());
  const v1::Job done = AwaitState(job, v1::JOB_STATE_CANCELLED);
  EXPECT_EQ(done.counts().succeeded() + done.counts().cancelled(), 5000);
  EXPECT_GE(done.counts().cancelled(), 4990);
  EXPECT_EQ(runner_->num_running(job), 0);
  EXPECT_THAT(Results(job), SizeIs(5000));
  caller_.AnswerAll();
  AwaitState(other, v1::JOB_STATE_COMPLETED);
}

TEST_F(BatchRunnerTest, AJobExpiresWithWhatIsFinished) {
  const JobId job = NewJob("a", 20).id;
  Run({.max_running = 5});
  caller_.Await(5);
  caller_.AnswerOne();
  ASSERT_TRUE(Eventually([&] { return store_->GetJob(job)->job.counts().succeeded() == 1; }));
  Pass(absl::Hours(2));
  const v1::Job done = AwaitState(job, v1::JOB_STATE_EXPIRED);
  EXPECT_EQ(done.counts().succeeded(), 1);
  EXPECT_EQ(done.counts().expired(), 19);
  EXPECT_EQ(caller_.num_calls(), 0u);
}

TEST_F(BatchRunnerTest, FailFastEndsTheJobWithTheFirstFailure) {
  v1::JobSpec spec = MakeSpec();
  spec.set_fail_fast(true);
  caller_.set_judge([](const std::string& prompt) {
    return prompt == "a-2" ? MakeBadRequest({{"text", "is bad"}}) : absl::OkStatus();
  });
  const JobId job = NewJob("a", 1000, spec).id;
  Run();
  caller_.AnswerAll();
  const v1::Job done = AwaitState(job, v1::JOB_STATE_FAILED);
  EXPECT_EQ(done.counts().failed(), 1);
  EXPECT_GT(done.counts().cancelled(), 900);
  EXPECT_THAT(done.state_reason(), testing::HasSubstr("item 2 failed"));
}

TEST_F(BatchRunnerTest, ADrainGivesBackWhatRuns) {
  const JobId job = NewJob("a", 20).id;
  Run({.max_running = 5});
  caller_.Await(5);
  runner_->StartDrain();
  EXPECT_TRUE(Eventually([&] { return runner_->num_running() == 0; }));
  EXPECT_EQ(caller_.num_calls(), 0u);
  const auto pending = store_->ReadPending(job, 0, 100, 1 << 20);
  ASSERT_THAT(*pending, SizeIs(20));
  for (const PendingItem& item : *pending) EXPECT_EQ(item.attempts, 0);
  StopRunner();
  Run();
  caller_.AnswerAll();
  EXPECT_EQ(AwaitState(job, v1::JOB_STATE_COMPLETED).counts().succeeded(), 20);
}

TEST_F(BatchRunnerTest, AnItemThatKillsTheServerFailsInTheEnd) {
  v1::JobSpec spec = MakeSpec();
  spec.set_max_attempts_per_item(2);
  const JobId job = NewJob("a", 3, spec).id;
  for (int i = 0; i < 2; ++i) {
    ASSERT_TRUE(Start(store_.get(), {{.job = job, .index = 1, .seed = 9}}).ok());  // and no end
  }
  store_.reset();
  OpenStore();
  Run();
  caller_.AnswerAll();
  AwaitState(job, v1::JOB_STATE_COMPLETED);
  const v1::ItemResult result = Results(job)[1];
  EXPECT_EQ(result.error().reason(), "ATTEMPTS_EXHAUSTED");
  EXPECT_EQ(result.attempts(), 2);
  EXPECT_EQ(caller_.num_begun("a-1"), 0);
}

TEST_F(BatchRunnerTest, AnItemThatIsNoneFails) {
  const auto upload = store_->OpenUpload("ann", "bad", MakeSpec());
  std::vector<NewItem> items = {{.custom_id = "x", .request = "\xff\xff"},
                                {.custom_id = "y", .request = ""}};
  ASSERT_TRUE(Append(store_.get(), upload->record.id, 0, std::move(items)).ok());
  ASSERT_TRUE(store_->CommitUpload(upload->record.id, 2, 10).ok());
  Run();
  AwaitState(upload->record.id, v1::JOB_STATE_COMPLETED);
  for (const auto& [index, result] : Results(upload->record.id)) {
    EXPECT_EQ(result.error().reason(), "MALFORMED_MESSAGE");
  }
}

TEST_F(BatchRunnerTest, EndedJobsArePurgedAfterTheirTime) {
  const JobRecord job = NewJob("a", 3);
  Run({.purge_interval = absl::Milliseconds(5)});
  caller_.AnswerAll();
  AwaitState(job.id, v1::JOB_STATE_COMPLETED);
  Pass(absl::Hours(1));
  EXPECT_TRUE(Eventually([&] { return absl::IsNotFound(store_->GetJob(job.id).status()); }));
}

}  // namespace
}  // namespace latentd
