#include "server/cluster/rank_session.h"

#include <unistd.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "engine/status.h"
#include "server/cluster/leader_channel.h"
#include "server/cluster/plan_codec.h"
#include "server/log.h"
#include "server/status.h"

namespace latentd {
namespace {

constexpr absl::Duration kAbortInterval = absl::Milliseconds(50);
constexpr int64_t kEveryEpoch = std::numeric_limits<int64_t>::max();

void ToWire(const absl::Status& status, v1::RankStatus* wire) {
  wire->set_code(static_cast<int32_t>(status.code()));
  wire->set_message(std::string(status.message()));
}

// That the leader or its network may be there in a moment, or that the process before this one is
// still being noticed as gone.
bool MayPass(const absl::Status& status) {
  return absl::IsUnavailable(status) || absl::IsAlreadyExists(status) ||
         absl::IsDeadlineExceeded(status);
}

}  // namespace

// Tells the leader how loading goes, a few times a second.
class RankSession::Listener final : public LoadListener {
 public:
  explicit Listener(RankSession* session) : session_(session) {}

  void OnPhase(std::string_view phase) override {
    loading_.set_phase(std::string(phase));
    Tell();
  }
  void OnPlan(const std::string&) override {}
  void OnProgress(uint64_t loaded_bytes, uint64_t total_bytes) override {
    loading_.set_loaded_bytes(loaded_bytes);
    loading_.set_total_bytes(total_bytes);
    if (absl::Now() >= next_ || loaded_bytes == total_bytes) Tell();
  }

 private:
  void Tell() {
    next_ = absl::Now() + absl::Milliseconds(200);
    v1::RankMessage message;
    *message.mutable_loading() = loading_;
    session_->Send(message);
  }

  RankSession* const session_;
  v1::RankLoading loading_;
  absl::Time next_ = absl::InfinitePast();
};

RankSession::RankSession(RankSessionOptions options, Loader loader)
    : options_(std::move(options)), loader_(std::move(loader)) {}

absl::Status RankSession::Run() {
  ASSIGN_OR_RETURN(const v1::Welcome welcome, Connect());
  std::thread engine([this, num_blocks = welcome.num_blocks()] { RunEngine(num_blocks); });
  std::thread pulse([this, interval = absl::Milliseconds(std::max<int64_t>(
                               welcome.heartbeat_interval_ms(), 1))] { RunPulse(interval); });
  const absl::Status status = ReadUntilEnd();
  End(status.ok() ? absl::CancelledError("the leader ends") : status);
  bool done;
  {
    absl::MutexLock lock(&mutex_);
    mutex_.AwaitWithTimeout(absl::Condition(&engine_done_), options_.leave_timeout);
    done = engine_done_;
  }
  if (!done && options_.on_stuck) options_.on_stuck(status);
  engine.join();
  pulse.join();
  absl::MutexLock lock(&mutex_);
  return why_ended_.ok() ? status : why_ended_;
}

void RankSession::Stop() {
  absl::MutexLock lock(&mutex_);
  if (why_ended_.ok()) why_ended_ = absl::CancelledError("the rank was told to stop");
  ended_ = true;
  if (context_) context_->TryCancel();
}

// ---- Run()'s thread --------------------------------------------------------------------------

absl::StatusOr<v1::Welcome> RankSession::Connect() {
  channel_ = DialLeader(options_.leader, options_.keepalive_time, options_.keepalive_timeout);
  stub_ = v1::RankService::NewStub(channel_);
  const absl::Time deadline = absl::Now() + options_.connect_timeout;
  while (true) {
    const absl::StatusOr<v1::Welcome> welcome = TryJoin(stub_.get());
    if (welcome.ok()) return welcome;
    {
      absl::MutexLock lock(&mutex_);
      if (!why_ended_.ok()) return why_ended_;
    }
    if (!MayPass(welcome.status()) || absl::Now() >= deadline) {
      return absl::Status(welcome.status().code(), absl::StrCat("cannot join ", options_.leader,
                                                                ": ", welcome.status().message()));
    }
    absl::SleepFor(absl::Milliseconds(100));
  }
}

absl::StatusOr<v1::Welcome> RankSession::TryJoin(v1::RankService::Stub* stub) {
  grpc::ClientContext* context;
  {
    absl::MutexLock lock(&mutex_);
    if (!why_ended_.ok()) return why_ended_;
    stream_.reset();
    context_ = std::make_unique<grpc::ClientContext>();
    context = context_.get();
  }
  stream_ = stub->Join(context);
  v1::RankMessage message;
  v1::RankJoin& join = *message.mutable_join();
  join.set_version(options_.version);
  join.set_rank(options_.rank);
  join.set_node(options_.node);
  join.set_host(HostName());
  join.set_pid(getpid());
  join.set_config_hash(options_.config_hash);
  join.set_checkpoint_hash(options_.checkpoint_hash);
  v1::LeaderMessage answer;
  if (Send(message) && stream_->Read(&answer) && answer.has_welcome()) return answer.welcome();
  context->TryCancel();
  const absl::Status status = FromGrpcStatus(stream_->Finish());
  return status.ok() ? absl::UnavailableError("the leader ended the stream") : status;
}

// OK when the leader says that it ends.
absl::Status RankSession::ReadUntilEnd() {
  v1::LeaderMessage message;
  while (stream_->Read(&message)) {
    if (message.has_shutdown()) {
      absl::MutexLock lock(&mutex_);
      context_->TryCancel();
      return absl::OkStatus();
    }
    OnMessage(&message);
  }
  const absl::Status status = FromGrpcStatus(stream_->Finish());
  return absl::UnavailableError(absl::StrCat("the leader is gone: ", status.message()));
}

void RankSession::OnMessage(v1::LeaderMessage* message) {
  absl::MutexLock lock(&mutex_);
  if (message->has_abort()) {
    // The engine may be in the epoch, on its way into it, or not there yet.
    aborted_epoch_ = std::max(aborted_epoch_, message->abort().epoch());
    why_aborted_ = absl::UnavailableError(message->abort().why());
    AbortAgain();
  }
  work_.push_back(std::move(*message));
}

void RankSession::End(const absl::Status& why) {
  absl::MutexLock lock(&mutex_);
  ended_ = true;
  aborted_epoch_ = kEveryEpoch;
  why_aborted_ = why;
  AbortAgain();
}

bool RankSession::Send(const v1::RankMessage& message) {
  absl::MutexLock lock(&write_mutex_);
  return stream_->Write(message);
}

// ---- the engine's thread ---------------------------------------------------------------------

void RankSession::RunEngine(int32_t num_blocks) {
  if (LoadEngine(num_blocks)) {
    while (true) {
      std::vector<v1::LeaderMessage> work;
      {
        absl::MutexLock lock(&mutex_);
        mutex_.Await(absl::Condition(
            +[](RankSession* self)
                 ABSL_NO_THREAD_SAFETY_ANALYSIS { return self->ended_ || !self->work_.empty(); },
            this));
        if (ended_) break;
        work.swap(work_);
      }
      for (const v1::LeaderMessage& item : work) Do(item);
    }
  }
  {
    absl::MutexLock lock(&mutex_);
    shared_member_ = nullptr;
  }
  member_.reset();
  absl::MutexLock lock(&mutex_);
  engine_done_ = true;
}

bool RankSession::LoadEngine(int32_t num_blocks) {
  Listener listener(this);
  absl::StatusOr<std::unique_ptr<GroupMember>> member = loader_(num_blocks, &listener);
  v1::RankMessage message;
  v1::RankReady& ready = *message.mutable_ready();
  if (member.ok()) {
    member_ = *std::move(member);
    if (options_.rank == 0) {
      const absl::StatusOr<std::string> id = member_->MakeUniqueId();
      if (!id.ok()) {
        Fail(id.status());
        return false;
      }
      ready.set_nccl_unique_id(*id);
    }
  } else {
    Fail(member.status());
    return false;
  }
  {
    absl::MutexLock lock(&mutex_);
    shared_member_ = member_.get();
  }
  const EngineInfo info = member_->info();
  v1::EngineLimits& limits = *ready.mutable_limits();
  limits.set_num_blocks(info.num_blocks);
  limits.set_max_step_tokens(info.max_step_tokens);
  limits.set_max_sequences(info.max_sequences);
  limits.set_max_model_len(info.max_model_len);
  limits.set_vocab_size(info.vocab_size);
  ready.set_address(member_->address());
  Send(message);
  return true;
}

// False when what is to be done is of no use any more.
bool RankSession::Begin(int64_t epoch) {
  absl::MutexLock lock(&mutex_);
  if (ended_ || epoch <= aborted_epoch_) return false;
  working_epoch_ = epoch;
  return true;
}

void RankSession::Finish() {
  absl::MutexLock lock(&mutex_);
  working_epoch_ = 0;
}

void RankSession::Do(const v1::LeaderMessage& work) {
  if (work.has_form()) return Form(work.form());
  if (work.has_step()) return Step(work.step());
  if (work.has_abort()) return ConfirmAbort(work.abort().epoch());
}

void RankSession::Form(const v1::Form& form) {
  if (!Begin(form.epoch())) return;
  const GroupSpec group = {.epoch = form.epoch(),
                           .rank = options_.rank,
                           .world_size = form.world_size(),
                           .addresses = {form.addresses().begin(), form.addresses().end()},
                           .nccl_unique_id = form.nccl_unique_id()};
  const absl::Status status =
      member_->Join(group, absl::Now() + absl::Milliseconds(form.timeout_ms()));
  Finish();
  if (status.ok()) {
    LogEvent(
        spdlog::level::info, "joined",
        {{"rank", options_.rank}, {"epoch", group.epoch}, {"transport", member_->transport()}});
    if (const std::string warning = member_->transport_warning(); !warning.empty()) {
      LogEvent(spdlog::level::warn, warning, {{"rank", options_.rank}});
    }
  }
  v1::RankMessage message;
  v1::Formed& formed = *message.mutable_formed();
  formed.set_epoch(group.epoch);
  ToWire(status, formed.mutable_status());
  formed.set_transport(member_->transport());
  Send(message);
  if (member_->lost()) Fail(status);
}

absl::StatusOr<StepResult> RankSession::Compute(const std::string& plan) {
  plan_.step = -1;
  RETURN_IF_ERROR(DecodePlan(plan, &plan_));
  {
    absl::MutexLock lock(&mutex_);
    step_ = plan_.step;
  }
  return member_->Execute(plan_);
}

void RankSession::Step(const v1::Step& step) {
  if (!Begin(step.epoch())) return;
  const absl::StatusOr<StepResult> result = Compute(step.plan());
  Finish();
  v1::RankMessage message;
  v1::StepDone& done = *message.mutable_step_done();
  done.set_epoch(step.epoch());
  done.set_step(plan_.step);
  ToWire(result.status(), done.mutable_status());
  if (result.ok()) {
    done.mutable_result()->resize(EncodedResultSize(*result));
    EncodeResult(*result, done.mutable_result()->data());
  } else {
    LogEvent(spdlog::level::warn, "step failed",
             {{"epoch", step.epoch()},
              {"step", plan_.step},
              {"why", std::string(result.status().message())}});
  }
  Send(message);
  if (member_->lost()) Fail(result.status());
}

void RankSession::ConfirmAbort(int64_t epoch) {
  v1::RankMessage message;
  message.mutable_aborted()->set_epoch(epoch);
  if (options_.rank == 0) {
    const absl::StatusOr<std::string> id = member_->MakeUniqueId();
    if (!id.ok()) return Fail(id.status());
    message.mutable_aborted()->set_nccl_unique_id(*id);
  }
  Send(message);
}

// The engine is of no use any more: says so and ends the session.
void RankSession::Fail(const absl::Status& why) {
  v1::RankMessage message;
  ToWire(why, message.mutable_failed()->mutable_status());
  Send(message);
  {
    absl::MutexLock write_lock(&write_mutex_);
    stream_->WritesDone();
  }
  absl::MutexLock lock(&mutex_);
  if (why_ended_.ok()) why_ended_ = why;
  ended_ = true;
}

// ---- the pulse -------------------------------------------------------------------------------

void RankSession::RunPulse(absl::Duration interval) {
  absl::Time next = absl::Now();
  v1::RankMessage message;
  while (true) {
    {
      absl::MutexLock lock(&mutex_);
      mutex_.AwaitWithTimeout(absl::Condition(&engine_done_), std::min(interval, kAbortInterval));
      AbortAgain();
      if (engine_done_) return;
      v1::Heartbeat& heartbeat = *message.mutable_heartbeat();
      heartbeat.set_waiting_in(shared_member_ == nullptr ? "" : shared_member_->waiting_in());
      heartbeat.set_step(step_);
    }
    if (absl::Now() < next) continue;
    next = absl::Now() + interval;
    Send(message);
  }
}

// An abort that comes just before the engine begins to wait would end nothing; hence over and over,
// as long as it is at something that was aborted.
void RankSession::AbortAgain() {
  if (shared_member_ != nullptr && working_epoch_ != 0 && working_epoch_ <= aborted_epoch_) {
    shared_member_->AbortGroup(why_aborted_);
  }
}

}  // namespace latentd
