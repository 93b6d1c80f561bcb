#ifndef LATENTD_SERVER_CLIENT_ANSWER_PRINTER_H_
#define LATENTD_SERVER_CLIENT_ANSWER_PRINTER_H_

#include <iosfwd>
#include <optional>
#include <string>
#include <string_view>

#include "absl/time/time.h"
#include "latentd/v1/inference.pb.h"

namespace latentd {

// How an answer is shown.
struct PrintStyle {
  bool json = false;           // every event as one line of JSON, and nothing else
  bool reasoning = false;      // show the reasoning, apart from the answer
  bool color = false;          // reasoning dimmed (ANSI); otherwise between <think> and </think>
  bool escape = false;         // control characters as ^X: an answer must not drive the terminal
  bool final_newline = false;  // end the answer with a line end
};

// Writes one streamed answer to `out` as it arrives, and keeps what is needed afterwards: the text
// for the next turn, and the figures. One object an answer.
class AnswerPrinter {
 public:
  // `out` must outlive the printer. It is flushed after every event.
  AnswerPrinter(PrintStyle style, std::ostream& out) : style_(style), out_(out) {}

  // `now` is when `event` arrived; it goes into Stats().
  void Print(const v1::GenerationEvent& event, absl::Time now);

  // After the last event, or when the stream broke: ends colour and line.
  void End();

  // The answer's content so far, as the model wrote it.
  const std::string& content() const { return content_; }

  // One line: tokens, speed, time to the first token since `sent`, finish reason. Empty before the
  // usage has arrived.
  std::string Stats(absl::Time sent) const;

 private:
  enum class Part { kNone, kReasoning, kContent, kToolCall };

  void PrintDelta(const v1::GenerationEvent::Delta& delta);
  void Begin(Part part, std::string_view text);
  void Write(std::string_view text);
  void Separate(std::string_view next);

  const PrintStyle style_;
  std::ostream& out_;
  Part part_ = Part::kNone;
  size_t trailing_newlines_ = 0;  // at the end of what was written
  bool written_ = false;
  std::string content_;
  v1::FinishReason finish_reason_ = v1::FINISH_REASON_UNSPECIFIED;
  std::optional<v1::Usage> usage_;
  std::optional<absl::Time> first_, last_;  // deltas
};

// `text` with C0 and C1 control characters other than tab and line feed made visible: "\x1b" is
// "^[".
std::string EscapeControls(std::string_view text);

}  // namespace latentd

#endif  // LATENTD_SERVER_CLIENT_ANSWER_PRINTER_H_
