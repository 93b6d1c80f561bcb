#ifndef LATENTD_TESTS_SERVER_BATCH_FAKE_CALLER_H_
#define LATENTD_TESTS_SERVER_BATCH_FAKE_CALLER_H_

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "server/local_caller.h"
#include "server/status.h"

namespace latentd {

// A caller without an engine: a call stays until the test ends it, or is answered at once. The
// answer to the prompt `x` is `x!`, or what `judge` says.
class FakeCaller : public LocalCaller {
 public:
  struct Call {
    std::string prompt;
    Options options;
    Done done;
  };

  explicit FakeCaller(int32_t capacity) : capacity_(capacity) {}

  int32_t capacity() const override {
    absl::MutexLock lock(&mutex_);
    return capacity_;
  }

  void Start(CallId id, LocalRequest request, const Options& options, Done done) override {
    Call call{.prompt = std::get<v1::CompleteRequest>(request).text(),
              .options = options,
              .done = std::move(done)};
    {
      absl::MutexLock lock(&mutex_);
      EXPECT_FALSE(calls_.contains(id));
      ++num_begun_[call.prompt];
      if (!answering_) {
        calls_.emplace(id, std::move(call));
        max_calls_ = std::max(max_calls_, calls_.size());
        return;
      }
    }
    Answer(std::move(call));
  }

  void Cancel(CallId id) override {
    Call call;
    {
      absl::MutexLock lock(&mutex_);
      const auto it = calls_.find(id);
      if (it == calls_.end()) return;
      call = std::move(it->second);
      calls_.erase(it);
    }
    call.done(MakeError(absl::StatusCode::kCancelled, "CANCELLED", "the call was cancelled"));
  }

  // ---- for tests ----

  void set_capacity(int32_t capacity) {
    absl::MutexLock lock(&mutex_);
    capacity_ = capacity;
  }
  // What becomes of a prompt; by default all succeed. Called without a lock.
  void set_judge(std::function<absl::Status(const std::string& prompt)> judge) {
    judge_ = std::move(judge);
  }

  // From now on calls are answered within Start(), those that are there now.
  void AnswerAll() {
    {
      absl::MutexLock lock(&mutex_);
      answering_ = true;
    }
    while (AnswerOne()) {
    }
  }
  void Hold() {
    absl::MutexLock lock(&mutex_);
    answering_ = false;
  }

  // Ends the call that came first, or the n-th. False when there is none.
  bool AnswerOne(size_t n = 0) {
    Call call;
    {
      absl::MutexLock lock(&mutex_);
      if (n >= calls_.size()) return false;
      const auto it = std::next(calls_.begin(), n);
      call = std::move(it->second);
      calls_.erase(it);
    }
    Answer(std::move(call));
    return true;
  }

  // Waits until so many calls are there; the prompts of all that are, in order.
  std::vector<std::string> Await(size_t count) {
    absl::MutexLock lock(&mutex_);
    const auto there = [&] { return calls_.size() >= count; };
    EXPECT_TRUE(mutex_.AwaitWithTimeout(absl::Condition(&there), absl::Seconds(30)))
        << calls_.size() << " calls of " << count;
    std::vector<std::string> prompts;
    for (const auto& [id, call] : calls_) prompts.push_back(call.prompt);
    return prompts;
  }
  std::vector<Options> options() const {
    absl::MutexLock lock(&mutex_);
    std::vector<Options> options;
    for (const auto& [id, call] : calls_) options.push_back(call.options);
    return options;
  }
  size_t num_calls() const {
    absl::MutexLock lock(&mutex_);
    return calls_.size();
  }
  size_t max_calls() const {
    absl::MutexLock lock(&mutex_);
    return max_calls_;
  }
  int num_begun(const std::string& prompt) const {
    absl::MutexLock lock(&mutex_);
    const auto it = num_begun_.find(prompt);
    return it == num_begun_.end() ? 0 : it->second;
  }

 private:
  void Answer(Call call) {
    const absl::Status judged = judge_ ? judge_(call.prompt) : absl::OkStatus();
    if (!judged.ok()) return call.done(judged);
    v1::CompleteResponse response;
    response.add_choices()->mutable_message()->set_content(call.prompt + "!");
    response.set_seed(call.options.seed);
    response.mutable_usage()->set_prompt_tokens(3);
    response.mutable_usage()->set_completion_tokens(5);
    call.done(LocalResponse(std::move(response)));
  }

  std::function<absl::Status(const std::string&)> judge_;
  mutable absl::Mutex mutex_;
  int32_t capacity_ ABSL_GUARDED_BY(mutex_);
  bool answering_ ABSL_GUARDED_BY(mutex_) = false;
  std::map<CallId, Call> calls_ ABSL_GUARDED_BY(mutex_);
  size_t max_calls_ ABSL_GUARDED_BY(mutex_) = 0;
  std::map<std::string, int> num_begun_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace latentd

#endif  // LATENTD_TESTS_SERVER_BATCH_FAKE_CALLER_H_
