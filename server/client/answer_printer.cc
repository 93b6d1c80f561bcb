#include "server/client/answer_printer.h"

#include <google/protobuf/util/json_util.h>

#include <algorithm>
#include <ostream>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"

namespace latentd {
namespace {

constexpr std::string_view kDim = "\x1b[2m";
constexpr std::string_view kPlain = "\x1b[0m";

// "stop" of FINISH_REASON_STOP.
std::string FinishName(v1::FinishReason reason) {
  const std::string name = v1::FinishReason_Name(reason);
  return absl::AsciiStrToLower(absl::StripPrefix(name, "FINISH_REASON_"));
}

}  // namespace

void AnswerPrinter::Print(const v1::GenerationEvent& event, absl::Time now) {
  if (style_.json) {
    google::protobuf::util::JsonPrintOptions options;
    options.preserve_proto_field_names = true;
    std::string line;
    // Fails on nothing that a parsed event can hold.
    if (google::protobuf::util::MessageToJsonString(event, &line, options).ok()) {
      out_ << line << '\n';
    }
  }
  switch (event.event_case()) {
    case v1::GenerationEvent::kDelta:
      if (!first_) first_ = now;
      last_ = now;
      PrintDelta(event.delta());
      break;
    case v1::GenerationEvent::kFinished:
      finish_reason_ = event.finished().finish_reason();
      break;
    case v1::GenerationEvent::kUsage:
      usage_ = event.usage();
      break;
    default:
      break;
  }
  out_.flush();
}

void AnswerPrinter::PrintDelta(const v1::GenerationEvent::Delta& delta) {
  content_ += delta.content();
  if (style_.json) return;
  switch (delta.part_case()) {
    case v1::GenerationEvent::Delta::kReasoning:
      if (!style_.reasoning) break;
      Begin(Part::kReasoning, delta.reasoning());
      Write(delta.reasoning());
      break;
    case v1::GenerationEvent::Delta::kContent:
      Begin(Part::kContent, delta.content());
      Write(delta.content());
      break;
    case v1::GenerationEvent::Delta::kToolCall:
      // The name comes with a call's first fragment.
      if (!delta.tool_call().name().empty()) {
        part_ = Part::kNone;
        Begin(Part::kToolCall, delta.tool_call().name());
        Write(absl::StrCat(delta.tool_call().name(), " "));
      }
      Write(delta.tool_call().arguments());
      break;
    case v1::GenerationEvent::Delta::PART_NOT_SET:
      break;
  }
}

// Ends the part before, and separates the two by an empty line. `text` is what comes next.
void AnswerPrinter::Begin(Part part, std::string_view text) {
  if (part_ == part || text.empty()) return;
  if (part_ == Part::kReasoning) {
    if (style_.color) {
      out_ << kPlain;
    } else {
      if (trailing_newlines_ == 0) Write("\n");
      Write("</think>");
    }
  }
  if (written_) Separate(text);
  part_ = part;
  if (part == Part::kReasoning) {
    if (style_.color) {
      out_ << kDim;
    } else {
      Write("<think>");
      if (!text.starts_with('\n')) Write("\n");
    }
  }
}

void AnswerPrinter::Separate(std::string_view next) {
  const size_t leading = std::min(next.find_first_not_of('\n'), next.size());
  for (size_t have = trailing_newlines_ + leading; have < 2; ++have) Write("\n");
}

void AnswerPrinter::Write(std::string_view text) {
  if (text.empty()) return;
  written_ = true;
  const size_t last = text.find_last_not_of('\n');
  trailing_newlines_ =
      last == std::string_view::npos ? trailing_newlines_ + text.size() : text.size() - last - 1;
  if (style_.escape) {
    out_ << EscapeControls(text);
  } else {
    out_ << text;
  }
}

void AnswerPrinter::End() {
  if (style_.json) return;
  if (part_ == Part::kReasoning) {
    if (style_.color) {
      out_ << kPlain;
    } else {
      if (trailing_newlines_ == 0) Write("\n");
      Write("</think>");
    }
  }
  if (style_.final_newline && written_ && trailing_newlines_ == 0) Write("\n");
  part_ = Part::kNone;
  out_.flush();
}

std::string AnswerPrinter::Stats(absl::Time sent) const {
  if (!usage_) return "";
  std::string line =
      absl::StrFormat("%d prompt tokens (%d cached), %d completion tokens", usage_->prompt_tokens(),
                      usage_->cached_tokens(), usage_->completion_tokens());
  if (usage_->reasoning_tokens() > 0) {
    absl::StrAppendFormat(&line, " (%d reasoning)", usage_->reasoning_tokens());
  }
  if (first_) {
    // The first delta's token took the time until it; the others came in the span after it.
    const double seconds = absl::ToDoubleSeconds(*last_ - *first_);
    if (usage_->completion_tokens() > 1 && seconds > 0) {
      absl::StrAppendFormat(&line, ", %.1f tokens/s", (usage_->completion_tokens() - 1) / seconds);
    }
    absl::StrAppendFormat(&line, ", first token after %.0f ms",
                          absl::ToDoubleMilliseconds(*first_ - sent));
  }
  return absl::StrCat(line, ", finish: ", FinishName(finish_reason_));
}

std::string EscapeControls(std::string_view text) {
  std::string escaped;
  escaped.reserve(text.size());
  for (size_t i = 0; i < text.size(); ++i) {
    const unsigned char c = text[i];
    if ((c < 0x20 && c != '\n' && c != '\t') || c == 0x7f) {
      escaped += '^';
      escaped += static_cast<char>(c ^ 0x40);
    } else if (c == 0xc2 && i + 1 < text.size() && static_cast<unsigned char>(text[i + 1]) < 0xa0) {
      // U+0080 to U+009F: some terminals obey them as they obey ESC and a letter.
      escaped += "^[";
      escaped += static_cast<char>(static_cast<unsigned char>(text[++i]) - 0x40);
    } else {
      escaped += static_cast<char>(c);
    }
  }
  return escaped;
}

}  // namespace latentd
