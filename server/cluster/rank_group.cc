#include "server/cluster/rank_group.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/status.h"
#include "server/cluster/plan_codec.h"
#include "server/log.h"

namespace latentd {
namespace {

absl::Status FromWire(const v1::RankStatus& status) {
  return absl::Status(static_cast<absl::StatusCode>(status.code()), status.message());
}

absl::Status Differs(std::string_view what, const std::string& theirs, const std::string& ours) {
  return absl::FailedPreconditionError(absl::StrCat("the rank's ", std::string(what), " is '",
                                                    theirs, "'; the leader's is '", ours, "'"));
}

std::string_view Name(LossReason reason) { return kLossReasonNames[static_cast<size_t>(reason)]; }

EngineInfo LeastOf(EngineInfo info, const v1::EngineLimits& limits) {
  info.num_blocks = std::min(info.num_blocks, limits.num_blocks());
  info.max_step_tokens = std::min(info.max_step_tokens, limits.max_step_tokens());
  info.max_sequences = std::min(info.max_sequences, limits.max_sequences());
  info.max_model_len = std::min(info.max_model_len, limits.max_model_len());
  info.vocab_size = std::min(info.vocab_size, limits.vocab_size());
  return info;
}

}  // namespace

RankGroup::RankGroup(
    const ClusterOptions& options,
    std::function<void(const ClusterStats::Rank&, int32_t, int32_t, const std::string&)> kill)
    : options_(options),
      kill_(std::move(kill)),
      members_(options.world_size),
      backoff_(options.min_backoff) {}

absl::Status RankGroup::CheckJoin(const v1::RankJoin& join) const {
  if (join.version() != options_.version) {
    return Differs("version", join.version(), options_.version);
  }
  if (join.rank() < 0 || join.rank() >= options_.world_size) {
    return absl::InvalidArgumentError(
        absl::StrCat("rank is ", join.rank(), "; world_size is ", options_.world_size));
  }
  if (join.node() < 0 || join.node() >= options_.num_nodes) {
    return absl::InvalidArgumentError(
        absl::StrCat("node is ", join.node(), "; num_nodes is ", options_.num_nodes));
  }
  if (join.config_hash() != options_.config_hash) {
    return Differs("configuration", join.config_hash(), options_.config_hash);
  }
  if (join.checkpoint_hash() != options_.checkpoint_hash) {
    return Differs("checkpoint", join.checkpoint_hash(), options_.checkpoint_hash);
  }
  const Member& member = members_[join.rank()];
  if (member.state != RankState::kAbsent) {
    return absl::AlreadyExistsError(absl::StrCat("rank ", join.rank(), " is there already: pid ",
                                                 member.pid, " on ", member.host));
  }
  return absl::OkStatus();
}

absl::Status RankGroup::Join(const v1::RankJoin& join, std::shared_ptr<PeerStream> stream,
                             absl::Time now) {
  if (shut_down_) return absl::UnavailableError("the leader ends");
  if (absl::Status status = CheckJoin(join); !status.ok()) {
    LogEvent(spdlog::level::warn, "rank refused",
             {{"rank", join.rank()},
              {"node", join.node()},
              {"host", join.host()},
              {"pid", join.pid()},
              {"why", std::string(status.message())}});
    return status;
  }
  Member& member = members_[join.rank()];
  const int32_t num_early_losses = member.num_early_losses;
  member = Member();
  member.state = RankState::kLoading;
  member.stream = std::move(stream);
  member.node = join.node();
  member.pid = join.pid();
  member.host = join.host();
  member.last_heard = now;
  member.num_early_losses = num_early_losses;
  LogEvent(
      spdlog::level::info, "rank joined",
      {{"rank", join.rank()}, {"node", join.node()}, {"host", join.host()}, {"pid", join.pid()}});
  v1::LeaderMessage message;
  v1::Welcome& welcome = *message.mutable_welcome();
  welcome.set_world_size(options_.world_size);
  welcome.set_heartbeat_interval_ms(absl::ToInt64Milliseconds(options_.heartbeat_interval));
  welcome.set_num_blocks(info_ ? info_->num_blocks : 0);
  member.stream->Send(message);
  return absl::OkStatus();
}

bool RankGroup::Holds(int32_t rank, const PeerStream* stream) const {
  return rank >= 0 && rank < options_.world_size && members_[rank].stream.get() == stream;
}

void RankGroup::OnMessage(int32_t rank, const v1::RankMessage& message, absl::Time now) {
  Member& member = members_[rank];
  member.last_heard = now;
  switch (message.message_case()) {
    case v1::RankMessage::kLoading:
      member.loaded_bytes = message.loading().loaded_bytes();
      member.total_bytes = message.loading().total_bytes();
      return;
    case v1::RankMessage::kReady:
      return OnReady(rank, message.ready(), now);
    case v1::RankMessage::kFormed:
      return OnFormed(rank, message.formed(), now);
    case v1::RankMessage::kStepDone:
      return OnStepDone(rank, message.step_done(), now);
    case v1::RankMessage::kAborted:
      return OnAborted(rank, message.aborted());
    case v1::RankMessage::kHeartbeat:
      member.waiting_in = message.heartbeat().waiting_in();
      return;
    case v1::RankMessage::kFailed:
      return OnFailed(rank, FromWire(message.failed().status()), now);
    case v1::RankMessage::kJoin:
    case v1::RankMessage::MESSAGE_NOT_SET:
      break;
  }
  OnGarbage(rank, "a message that is none, or a second join", now);
}

void RankGroup::OnReady(int32_t rank, const v1::RankReady& ready, absl::Time now) {
  Member& member = members_[rank];
  const v1::EngineLimits& limits = ready.limits();
  if (member.state != RankState::kLoading || limits.num_blocks() < 1 ||
      limits.max_step_tokens() < 1 || limits.max_sequences() < 1 || limits.max_model_len() < 1 ||
      limits.vocab_size() < 1) {
    return OnGarbage(rank, "ready, though it was, or without limits", now);
  }
  if (info_) {
    const EngineInfo least = LeastOf(*info_, limits);
    if (least.num_blocks < info_->num_blocks || least.max_step_tokens < info_->max_step_tokens ||
        least.max_sequences < info_->max_sequences || least.max_model_len < info_->max_model_len ||
        limits.vocab_size() != info_->vocab_size) {
      return Lose(
          rank, LossReason::kUnfit,
          absl::StrCat("its limits are below those of the group: ", limits.ShortDebugString()),
          /*kill=*/true, now);
    }
  }
  member.limits = limits;
  member.unique_id = ready.nccl_unique_id();
  member.address = absl::StartsWith(ready.address(), ":")
                       ? absl::StrCat(member.stream->peer_host(), ready.address())
                       : ready.address();
  member.state = RankState::kReady;
  LogEvent(spdlog::level::info, "rank ready",
           {{"rank", rank}, {"node", member.node}, {"num_blocks", limits.num_blocks()}});
}

// Forms the group when all ranks can and the pause is over.
void RankGroup::Form(absl::Time now) {
  if (now < form_not_before_) return;
  const bool ready = std::all_of(members_.begin(), members_.end(), [](const Member& member) {
    return member.state == RankState::kReady;
  });
  if (!ready) return;
  ++epoch_;
  forming_ = true;
  form_deadline_ = now + options_.form_timeout;
  v1::LeaderMessage message;
  v1::Form& form = *message.mutable_form();
  form.set_epoch(epoch_);
  form.set_world_size(options_.world_size);
  for (const Member& member : members_) form.add_addresses(member.address);
  form.set_nccl_unique_id(members_[0].unique_id);
  form.set_timeout_ms(absl::ToInt64Milliseconds(options_.form_timeout));
  for (Member& member : members_) {
    member.state = RankState::kForming;
    member.waiting_in.clear();
    member.stream->Send(message);
  }
  LogEvent(spdlog::level::info, "group is being formed",
           {{"epoch", epoch_}, {"world_size", options_.world_size}});
}

void RankGroup::OnFormed(int32_t rank, const v1::Formed& formed, absl::Time now) {
  Member& member = members_[rank];
  if (formed.epoch() != epoch_ || member.state != RankState::kForming) return;  // of a lost group
  if (const absl::Status status = FromWire(formed.status()); !status.ok()) {
    return GiveUpEpoch(LossReason::kFormError,
                       absl::StrCat("rank ", rank, " could not join: ", status.message()), now);
  }
  member.state = RankState::kFormed;
  member.transport = formed.transport();
  const bool all = std::all_of(members_.begin(), members_.end(), [](const Member& other) {
    return other.state == RankState::kFormed;
  });
  if (all) OnAllFormed(now);
}

void RankGroup::OnAllFormed(absl::Time now) {
  forming_ = false;
  formed_ = true;
  if (!info_) {
    constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
    EngineInfo info = {.num_blocks = kMost,
                       .num_dp_ranks = options_.world_size,
                       .max_step_tokens = kMost,
                       .max_sequences = kMost,
                       .max_model_len = kMost,
                       .vocab_size = kMost};
    for (const Member& member : members_) info = LeastOf(info, member.limits);
    info_ = info;
  }
  ++stats_.num_formed;
  // Ranks on one host may have a faster way to each other than to the rest: say each.
  std::vector<std::string> transports;
  for (const Member& member : members_) transports.push_back(member.transport);
  std::sort(transports.begin(), transports.end());
  transports.erase(std::unique(transports.begin(), transports.end()), transports.end());
  stats_.transport = absl::StrJoin(transports, "+");
  stats_.last_forming_seconds =
      since_ == absl::InfinitePast() ? 0 : absl::ToDoubleSeconds(now - since_);
  LogEvent(spdlog::level::info, "group formed",
           {{"epoch", epoch_},
            {"world_size", options_.world_size},
            {"transport", stats_.transport},
            {"seconds_without", stats_.last_forming_seconds}});
}

bool RankGroup::BeginStep(int64_t epoch, int64_t step, std::vector<StepResult>* results,
                          std::vector<std::shared_ptr<PeerStream>>* streams) {
  if (!formed_ || epoch != epoch_) return false;
  results->resize(options_.world_size);
  step_ = Step{.number = step,
               .results = results,
               .has = std::vector<bool>(options_.world_size),
               .num_missing = options_.world_size,
               .status = absl::OkStatus()};
  streams->clear();
  for (const Member& member : members_) streams->push_back(member.stream);
  return true;
}

void RankGroup::OnStepDone(int32_t rank, const v1::StepDone& done, absl::Time now) {
  Member& member = members_[rank];
  if (done.epoch() != epoch_ || member.state != RankState::kFormed) return;  // of a lost group
  if (step_done() || done.step() != step_->number || step_->has[rank]) {
    return OnGarbage(rank, absl::StrCat("the result of step ", done.step(), ", which it has not"),
                     now);
  }
  if (const absl::Status status = FromWire(done.status()); !status.ok()) {
    return OnStepError(rank, status, now);
  }
  if (const absl::Status status = DecodeResult(done.result(), &(*step_->results)[rank]);
      !status.ok()) {
    return OnGarbage(rank, absl::StrCat("step ", done.step(), ": ", status.message()), now);
  }
  step_->has[rank] = true;
  if (--step_->num_missing == 0) {
    ++stats_.num_steps;
    backoff_ = options_.min_backoff;
    for (Member& each : members_) each.num_step_errors = 0;
  }
}

// Nobody is lost by an error of a step, which may have been a peer's; but a rank that fails step
// after step by itself holds up all others.
void RankGroup::OnStepError(int32_t rank, const absl::Status& status, absl::Time now) {
  const std::string why =
      absl::StrCat("rank ", rank, ": step ", step_->number, ": ", status.message());
  const bool of_a_peer = absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status) ||
                         absl::IsAborted(status) || absl::IsCancelled(status);
  if (!of_a_peer && ++members_[rank].num_step_errors >= options_.max_step_errors) {
    return Lose(rank, LossReason::kFailed, why, /*kill=*/true, now);
  }
  GiveUpEpoch(LossReason::kStepError, why, now);
}

void RankGroup::OnStepDeadline(absl::Time now) {
  if (step_done()) return;
  std::vector<int32_t> missing;
  for (int32_t rank = 0; rank < options_.world_size; ++rank) {
    if (!step_->has[rank]) missing.push_back(rank);
  }
  const std::string waiting = Waiting(RankState::kFormed);
  LogEvent(spdlog::level::err, "step over its deadline",
           {{"epoch", epoch_},
            {"step", step_->number},
            {"step_deadline", absl::FormatDuration(options_.step_deadline)},
            {"missing", absl::StrJoin(missing, ",")},
            {"waiting", waiting}});
  GiveUpEpoch(
      LossReason::kStepDeadline,
      absl::StrCat("step ", step_->number, " took longer than ",
                   absl::FormatDuration(options_.step_deadline), " (step_deadline): ", waiting),
      now);
}

std::string RankGroup::Waiting(RankState state) const {
  std::vector<std::string> lines;
  for (int32_t rank = 0; rank < options_.world_size; ++rank) {
    const Member& member = members_[rank];
    if (member.state != state) continue;
    if (state == RankState::kFormed && step_ && step_->has[rank]) continue;
    lines.push_back(member.waiting_in.empty()
                        ? absl::StrCat("rank ", rank, " computes")
                        : absl::StrCat("rank ", rank, " waits in ", member.waiting_in));
  }
  return absl::StrJoin(lines, "; ");
}

absl::Status RankGroup::EndStep() {
  LATENTD_CHECK(step_.has_value() && step_done());
  absl::Status status = std::move(step_->status);
  step_.reset();
  return status;
}

void RankGroup::OnAborted(int32_t rank, const v1::Aborted& aborted) {
  Member& member = members_[rank];
  if (aborted.epoch() != epoch_ || member.state != RankState::kAborting) return;
  member.unique_id = aborted.nccl_unique_id();
  member.state = RankState::kReady;
}

void RankGroup::OnFailed(int32_t rank, const absl::Status& why, absl::Time now) {
  if (!info_ && members_[rank].state == RankState::kLoading && load_status_.ok()) {
    load_status_ = absl::Status(why.code(), absl::StrCat("rank ", rank, ": ", why.message()));
  }
  Lose(rank, LossReason::kFailed, std::string(why.message()), /*kill=*/false, now);
}

void RankGroup::OnGone(int32_t rank, const std::string& how, absl::Time now) {
  Lose(rank, LossReason::kExited, how, /*kill=*/false, now);
}

void RankGroup::OnProcessExited(int32_t rank, int32_t pid, const std::string& how, absl::Time now) {
  if (rank < 0 || rank >= options_.world_size) return;
  LogEvent(shut_down_ ? spdlog::level::info : spdlog::level::warn, "rank exited",
           {{"rank", rank}, {"pid", pid}, {"how", how}});
  Member& member = members_[rank];
  if (member.state != RankState::kAbsent && member.pid != pid) return;
  if (member.state != RankState::kAbsent) return Lose(rank, LossReason::kExited, how, false, now);
  // It was there before, or never came so far as to join.
  if (member.pid == pid) return;
  member.pid = pid;
  CountEarlyLoss(rank, how);
}

void RankGroup::CountEarlyLoss(int32_t rank, const std::string& how) {
  Member& member = members_[rank];
  if (info_ || ++member.num_early_losses < options_.max_early_losses || !load_status_.ok()) return;
  load_status_ = absl::UnavailableError(absl::StrCat(
      "rank ", rank, " was lost ", member.num_early_losses, " times while loading: ", how));
}

void RankGroup::OnGarbage(int32_t rank, const std::string& what, absl::Time now) {
  Lose(rank, LossReason::kGarbage, what, /*kill=*/true, now);
}

void RankGroup::Lose(int32_t rank, LossReason reason, const std::string& why, bool kill,
                     absl::Time now) {
  Member& member = members_[rank];
  if (member.state == RankState::kAbsent) return;
  if (shut_down_) {  // it does as it was told
    member.stream.reset();
    member.state = RankState::kAbsent;
    return;
  }
  ++stats_.ranks_lost[static_cast<size_t>(reason)];
  LogEvent(spdlog::level::warn, "rank lost",
           {{"rank", rank},
            {"node", member.node},
            {"host", member.host},
            {"pid", member.pid},
            {"state", kRankStateNames[static_cast<size_t>(member.state)]},
            {"reason", Name(reason)},
            {"why", why}});
  if (kill) kill_({.node = member.node, .state = member.state}, rank, member.pid, why);
  member.stream->Cancel();
  member.stream.reset();
  member.state = RankState::kAbsent;
  CountEarlyLoss(rank, why);
  GiveUpEpoch(reason,
              absl::StrCat("rank ", rank, " is lost: ", std::string(Name(reason)), ": ", why), now);
}

// Ends the epoch, if one is formed or being formed: the ranks that are left must abort.
void RankGroup::GiveUpEpoch(LossReason reason, const std::string& why, absl::Time now) {
  if (!forming_ && !formed_) return;
  if (formed_) since_ = now;
  forming_ = formed_ = false;
  ++stats_.groups_given_up[static_cast<size_t>(reason)];
  form_not_before_ = now + backoff_;
  LogEvent(spdlog::level::warn, "group given up",
           {{"epoch", epoch_}, {"why", why}, {"backoff", absl::FormatDuration(backoff_)}});
  backoff_ = std::min(backoff_ * 2, options_.max_backoff);
  if (step_ && step_->status.ok()) step_->status = absl::AbortedError(why);
  v1::LeaderMessage message;
  message.mutable_abort()->set_epoch(epoch_);
  message.mutable_abort()->set_why(why);
  for (Member& member : members_) {
    if (member.state != RankState::kForming && member.state != RankState::kFormed) continue;
    member.state = RankState::kAborting;
    member.abort_deadline = now + options_.abort_timeout;
    member.stream->Send(message);
  }
}

void RankGroup::Tick(absl::Time now) {
  if (shut_down_) return;
  for (int32_t rank = 0; rank < options_.world_size; ++rank) {
    const Member& member = members_[rank];
    if (member.state == RankState::kAbsent) continue;
    if (now - member.last_heard > options_.heartbeat_timeout) {
      Lose(rank, LossReason::kSilent,
           absl::StrCat(
               "no sign of life for ",
               absl::FormatDuration(absl::Trunc(now - member.last_heard, absl::Milliseconds(1)))),
           /*kill=*/true, now);
    } else if (member.state == RankState::kAborting && now > member.abort_deadline) {
      Lose(rank, LossReason::kAbortTimeout,
           absl::StrCat("it did not abort within ", absl::FormatDuration(options_.abort_timeout),
                        member.waiting_in.empty() ? std::string(": it computes")
                                                  : ": it waits in " + member.waiting_in),
           /*kill=*/true, now);
    }
  }
  if (forming_ && now > form_deadline_) {
    GiveUpEpoch(LossReason::kFormError,
                absl::StrCat("not formed within ", absl::FormatDuration(options_.form_timeout),
                             ": ", Waiting(RankState::kForming)),
                now);
  }
  if (!forming_ && !formed_) Form(now);
}

void RankGroup::Shutdown() {
  shut_down_ = true;
  formed_ = forming_ = false;
  if (step_ && step_->status.ok()) step_->status = absl::AbortedError("the leader ends");
  v1::LeaderMessage message;
  message.mutable_shutdown();
  for (Member& member : members_) {
    if (member.stream == nullptr) continue;
    member.stream->Send(message);
  }
}

GroupProgress RankGroup::progress() const {
  GroupProgress progress;
  progress.formed = formed_;
  for (int32_t rank = 0; rank < options_.world_size; ++rank) {
    const Member& member = members_[rank];
    progress.loaded_bytes += member.loaded_bytes;
    progress.total_bytes += member.total_bytes;
    if (member.state == RankState::kAbsent) progress.absent.push_back(rank);
  }
  return progress;
}

ClusterStats RankGroup::stats() const {
  ClusterStats stats = stats_;
  stats.epoch = epoch_;
  stats.formed = formed_;
  for (const Member& member : members_) {
    stats.ranks.push_back({.node = member.node, .state = member.state});
  }
  return stats;
}

}  // namespace latentd
