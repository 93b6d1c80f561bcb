#include "server/client/batch_progress.h"

#include <algorithm>
#include <cmath>
#include <ostream>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"

namespace latentd {
namespace {

constexpr int kBarWidth = 30;
constexpr absl::Duration kTerminalEvery = absl::Milliseconds(100);
constexpr absl::Duration kLogEvery = absl::Seconds(10);
constexpr absl::Duration kRateOver = absl::Minutes(1);

std::string Bar(double share) {
  const int full = static_cast<int>(share * kBarWidth);
  return absl::StrCat("[", std::string(full, '#'), std::string(kBarWidth - full, '-'), "]");
}

}  // namespace

void ProgressBar::Show(const std::string& phase, int64_t done, int64_t total,
                       const std::string& suffix, absl::Time now) {
  const bool is_new_phase = phase != phase_;
  if (is_new_phase) {
    phase_ = phase;
    history_.clear();
  }
  history_.emplace_back(now, done);
  // One point beyond the window stays: the rate is over at least all of it.
  while (history_.size() > 2 && now - history_[1].first > kRateOver) history_.pop_front();
  const double share = total > 0 ? static_cast<double>(done) / static_cast<double>(total) : 1;
  line_ = absl::StrFormat("%s %s %3.0f %%  %d/%d items", phase, Bar(share), std::floor(100 * share),
                          done, total);
  const double seconds = absl::ToDoubleSeconds(now - history_.front().first);
  const int64_t gained = done - history_.front().second;
  if (seconds > 0 && gained > 0) {
    const double rate = static_cast<double>(gained) / seconds;
    absl::StrAppendFormat(&line_, rate < 100 ? ", %.1f/s" : ", %.0f/s", rate);
    if (done < total) {
      const double left = static_cast<double>(total - done) / rate;
      absl::StrAppend(&line_, ", ", ShortDuration(absl::Seconds(left)), " left");
    }
  }
  line_ += suffix;
  is_pending_ = true;
  if (is_new_phase || now - written_ >= (is_terminal_ ? kTerminalEvery : kLogEvery)) {
    written_ = now;
    Write();
  }
}

void ProgressBar::Write() {
  err_ << (is_terminal_ ? "\r\x1b[K" : "") << line_ << (is_terminal_ ? "" : "\n") << std::flush;
  is_pending_ = false;
  shown_ = true;
}

void ProgressBar::End() {
  if (is_pending_) Write();
  if (shown_ && is_terminal_) err_ << '\n' << std::flush;
  shown_ = false;
  phase_.clear();
}

std::string ShortDuration(absl::Duration duration) {
  const auto seconds = static_cast<int64_t>(std::ceil(absl::ToDoubleSeconds(duration)));
  if (seconds < 100) return absl::StrCat(seconds, " s");
  if (seconds < 3600) return absl::StrFormat("%dm %02ds", seconds / 60, seconds % 60);
  if (seconds < 86400) return absl::StrFormat("%dh %02dm", seconds / 3600, seconds / 60 % 60);
  return absl::StrFormat("%dd %02dh", seconds / 86400, seconds / 3600 % 24);
}

std::string StateName(v1::JobState state) {
  return absl::AsciiStrToLower(absl::StripPrefix(v1::JobState_Name(state), "JOB_STATE_"));
}

std::string StateName(v1::ItemState state) {
  return absl::AsciiStrToLower(absl::StripPrefix(v1::ItemState_Name(state), "ITEM_STATE_"));
}

std::optional<v1::JobState> ParseJobState(const std::string& name) {
  v1::JobState state;
  const bool known =
      v1::JobState_Parse(absl::StrCat("JOB_STATE_", absl::AsciiStrToUpper(name)), &state);
  return known && state != v1::JOB_STATE_UNSPECIFIED ? std::optional(state) : std::nullopt;
}

std::optional<v1::ItemState> ParseItemState(const std::string& name) {
  v1::ItemState state;
  const bool known =
      v1::ItemState_Parse(absl::StrCat("ITEM_STATE_", absl::AsciiStrToUpper(name)), &state);
  return known && state != v1::ITEM_STATE_UNSPECIFIED ? std::optional(state) : std::nullopt;
}

bool HasEnded(v1::JobState state) {
  return state == v1::JOB_STATE_COMPLETED || state == v1::JOB_STATE_FAILED ||
         state == v1::JOB_STATE_EXPIRED || state == v1::JOB_STATE_CANCELLED;
}

int64_t NumEnded(const v1::JobCounts& counts) {
  return counts.succeeded() + counts.failed() + counts.cancelled() + counts.expired();
}

}  // namespace latentd
