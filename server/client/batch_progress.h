#ifndef LATENTD_SERVER_CLIENT_BATCH_PROGRESS_H_
#define LATENTD_SERVER_CLIENT_BATCH_PROGRESS_H_

#include <cstdint>
#include <deque>
#include <iosfwd>
#include <optional>
#include <string>
#include <utility>

#include "absl/time/time.h"
#include "latentd/v1/batch.pb.h"

namespace latentd {

// How far something is, out of how much: with its rate over the last minute and the time that is
// left. On a terminal one line that is rewritten, elsewhere a line now and then.
//   in_progress [#########---------------------]  31 %  620/2000 items, 41.2/s, 33 s left, 2 failed
class ProgressBar {
 public:
  ProgressBar(bool is_terminal, std::ostream& err) : is_terminal_(is_terminal), err_(err) {}

  // `phase` is a word; a change of it is always shown. `suffix` goes to the end of the line.
  void Show(const std::string& phase, int64_t done, int64_t total, const std::string& suffix,
            absl::Time now);
  // Before anything else is written: shows what was held back, and leaves the line.
  void End();

 private:
  void Write();

  const bool is_terminal_;
  std::ostream& err_;
  std::string phase_;
  std::deque<std::pair<absl::Time, int64_t>> history_;  // done items, since the phase began
  absl::Time written_ = absl::InfinitePast();
  std::string line_;         // to write
  bool is_pending_ = false;  // line_ is not written
  bool shown_ = false;       // on the terminal there is a line
};

// "2h 13m", "41 s".
std::string ShortDuration(absl::Duration duration);

// "in_progress" of JOB_STATE_IN_PROGRESS; the same of an item.
std::string StateName(v1::JobState state);
std::string StateName(v1::ItemState state);
// The reverse; nullopt for what is no state.
std::optional<v1::JobState> ParseJobState(const std::string& name);
std::optional<v1::ItemState> ParseItemState(const std::string& name);

bool HasEnded(v1::JobState state);
// Items with a result.
int64_t NumEnded(const v1::JobCounts& counts);

}  // namespace latentd

#endif  // LATENTD_SERVER_CLIENT_BATCH_PROGRESS_H_
