#include "server/client/chat.h"

#include <unistd.h>

#include <cstdlib>
#include <iostream>
#include <memory>
#include <ostream>
#include <utility>

#include "CLI/CLI.hpp"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/status.h"
#include "google/protobuf/stubs/common.h"
#include "server/client/line_reader.h"

namespace latentd {
namespace {

// Far more than any prompt; a mistaken `latentd chat < disk.img` ends here.
constexpr size_t kMaxInputBytes = 64 << 20;

constexpr char kHelp[] =
    "/system TEXT       set the system message and start over (without TEXT: none)\n"
    "/thinking on|off   whether the model shall reason first (auto: its own default)\n"
    "/retry             ask for the last message again\n"
    "/reset             start over\n"
    "/stats             figures after each answer: on, off\n"
    "/help              this list\n"
    "/exit              leave; so does Ctrl-D\n"
    "\"\"\" begins a message of several lines and ends it. Ctrl-C stops a running answer.\n";

absl::Status CheckUtf8(absl::string_view what, const std::string& text) {
  if (google::protobuf::internal::IsStructurallyValidUTF8(text.data(),
                                                          static_cast<int>(text.size()))) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(what, " is not valid UTF-8"));
}

absl::Status ValidateOptions(const ChatOptions& options) {
  RETURN_IF_ERROR(ValidateConnectionOptions(options.session.connection));
  RETURN_IF_ERROR(CheckUtf8("--system", options.session.system));
  RETURN_IF_ERROR(CheckUtf8("--model", options.session.request.model()));
  for (const std::string& stop : options.session.request.limits().stop()) {
    RETURN_IF_ERROR(CheckUtf8("--stop", stop));
  }
  if (options.reasoning != "auto" && options.reasoning != "show" && options.reasoning != "hide") {
    return absl::InvalidArgumentError(
        absl::StrCat("--reasoning is '", options.reasoning, "'; known are: auto, show, hide"));
  }
  return absl::OkStatus();
}

PrintStyle MakeStyle(const ChatOptions& options, const ChatTerminal& terminal) {
  const bool plain = options.raw || options.json;
  const bool on_terminal = terminal.out_is_terminal && !plain;
  return PrintStyle{
      .json = options.json,
      .reasoning = options.reasoning == "show" || (options.reasoning == "auto" && on_terminal),
      .color = on_terminal && !terminal.no_color,
      .escape = on_terminal,
      .final_newline = !plain,
  };
}

// The message that the command line gives, or standard input.
absl::StatusOr<std::string> TakeMessage(const ChatOptions& options, const ChatTerminal& terminal,
                                        const Interrupts& interrupts) {
  std::string message = absl::StrJoin(options.words, " ");
  if (options.words.empty() || message == "-") {
    ASSIGN_OR_RETURN(message, ReadAll(terminal.in_fd, kMaxInputBytes, interrupts));
    // The line end that echo and editors put there.
    if (message.ends_with('\n')) message.pop_back();
    if (message.ends_with('\r')) message.pop_back();
  }
  if (message.empty()) return absl::InvalidArgumentError("the message is empty");
  RETURN_IF_ERROR(CheckUtf8("the message", message));
  return message;
}

// The loop of `latentd chat` on a terminal. Prompts go to `err`: standard output holds answers
// alone.
class Conversation {
 public:
  Conversation(ChatSession& session, Interrupts& interrupts, const ChatTerminal& terminal)
      : session_(session),
        interrupts_(interrupts),
        err_(terminal.err),
        reader_(terminal.in_fd, interrupts) {}

  void Run() {
    err_ << "latentd chat with " << session_.options().connection.target
         << " (/help, Ctrl-D to leave)" << std::endl;
    std::string line;
    while (ReadLine(">>> ", &line)) {
      if (line == "\"\"\"" && !ReadBlock(&line)) continue;
      if (line.starts_with('/')) {
        if (!Command(line)) return;
      } else if (!absl::StripAsciiWhitespace(line).empty()) {
        Say(line);
      }
      interrupts_.Clear();
    }
  }

 private:
  // False at the end of the input. Ctrl-C drops the line and asks again.
  bool ReadLine(absl::string_view prompt, std::string* line) {
    while (true) {
      err_ << prompt << std::flush;
      switch (reader_.Read(line)) {
        case LineReader::Event::kLine:
          return true;
        case LineReader::Event::kEnd:
          err_ << std::endl;
          return false;
        case LineReader::Event::kInterrupted:
          interrupts_.Clear();
          err_ << std::endl;
      }
    }
  }

  // Reads up to the closing """; false when Ctrl-C or the end of the input drops the message.
  bool ReadBlock(std::string* message) {
    message->clear();
    std::string line;
    while (true) {
      err_ << "... " << std::flush;
      if (reader_.Read(&line) != LineReader::Event::kLine) {
        interrupts_.Clear();
        err_ << std::endl;
        return false;
      }
      if (line == "\"\"\"") return true;
      absl::StrAppend(message, message->empty() ? "" : "\n", line);
    }
  }

  void Say(const std::string& message) {
    if (absl::Status valid = CheckUtf8("the message", message); !valid.ok()) {
      err_ << "error: " << valid.message() << std::endl;
      return;
    }
    NoteIfInterrupted(session_.Say(message));
  }

  void NoteIfInterrupted(int exit_code) {
    if (exit_code == kExitInterrupted) err_ << "[stopped]" << std::endl;
  }

  // False when it is time to leave.
  bool Command(absl::string_view line) {
    const size_t space = line.find(' ');
    const absl::string_view name = line.substr(0, space);
    const std::string argument(
        absl::StripAsciiWhitespace(space == absl::string_view::npos ? "" : line.substr(space)));
    ChatSession::Options& options = session_.options();
    if (name == "/exit" || name == "/quit") return false;
    if (name == "/help") {
      err_ << kHelp << std::flush;
    } else if (name == "/reset") {
      session_.Reset();
      err_ << "[new conversation]" << std::endl;
    } else if (name == "/retry") {
      NoteIfInterrupted(session_.Retry());
    } else if (name == "/stats") {
      options.stats = !options.stats;
      err_ << "[stats " << (options.stats ? "on" : "off") << "]" << std::endl;
    } else if (name == "/system") {
      SetSystem(argument);
    } else if (name == "/thinking") {
      SetThinking(argument);
    } else {
      err_ << "unknown command " << name << "; /help lists them" << std::endl;
    }
    return true;
  }

  void SetSystem(const std::string& text) {
    if (absl::Status valid = CheckUtf8("the system message", text); !valid.ok()) {
      err_ << "error: " << valid.message() << std::endl;
      return;
    }
    session_.options().system = text;
    session_.Reset();
    err_ << "[new conversation, " << (text.empty() ? "no" : "new") << " system message]"
         << std::endl;
  }

  void SetThinking(const std::string& value) {
    v1::ChatRequest& request = session_.options().request;
    if (value == "on" || value == "off") {
      request.set_thinking(value == "on");
    } else if (value == "auto") {
      request.clear_thinking();
    } else {
      err_ << "/thinking takes on, off or auto" << std::endl;
      return;
    }
    err_ << "[thinking " << value << "]" << std::endl;
  }

  ChatSession& session_;
  Interrupts& interrupts_;
  std::ostream& err_;
  LineReader reader_;
};

void AddRequestOptions(CLI::App& app, v1::ChatRequest* request) {
  v1::Sampling* sampling = request->mutable_sampling();
  v1::Limits* limits = request->mutable_limits();
  app.add_option_function<std::string>(
      "--model", [=](const std::string& name) { request->set_model(name); },
      "Model name (default: the one that is served)");
  app.add_flag_callback(
      "--thinking", [=] { request->set_thinking(true); }, "Ask the model to reason first");
  app.add_flag_callback(
         "--no-thinking", [=] { request->set_thinking(false); }, "Ask it not to reason")
      ->excludes("--thinking");
  app.add_option_function<float>(
      "--temperature", [=](float value) { sampling->set_temperature(value); },
      "Randomness, 0 to 2; 0 is greedy");
  app.add_option_function<float>(
      "--top-p", [=](float value) { sampling->set_top_p(value); }, "Nucleus, above 0 up to 1");
  app.add_option_function<int32_t>(
      "--top-k", [=](int32_t value) { sampling->set_top_k(value); }, "Only the k likeliest tokens");
  app.add_option_function<float>(
      "--min-p", [=](float value) { sampling->set_min_p(value); },
      "Only tokens at least this likely, relative to the likeliest, 0 to 1");
  app.add_option_function<uint64_t>(
      "--seed", [=](uint64_t value) { sampling->set_seed(value); },
      "Seed: the same one gives the same answer");
  app.add_option_function<int32_t>(
      "--max-tokens", [=](int32_t value) { limits->set_max_tokens(value); },
      "Longest answer, in tokens");
  app.add_option_function<std::vector<std::string>>(
         "--stop",
         [=](const std::vector<std::string>& stops) {
           for (const std::string& stop : stops) limits->add_stop(stop);
         },
         "Text that ends the answer; may be given several times")
      ->allow_extra_args(false);
}

}  // namespace

int RunChat(const ChatOptions& options, const ChatTerminal& terminal) {
  if (absl::Status valid = ValidateOptions(options); !valid.ok()) {
    terminal.err << "error: " << valid.message() << std::endl;
    return kExitUsage;
  }
  Interrupts interrupts;
  ChatSession::Options session_options = options.session;
  session_options.style = MakeStyle(options, terminal);
  ChatSession session(std::move(session_options), interrupts, terminal.out, terminal.err);
  if (options.words.empty() && terminal.in_is_terminal) {
    Conversation(session, interrupts, terminal).Run();
    return kExitOk;
  }
  absl::StatusOr<std::string> message = TakeMessage(options, terminal, interrupts);
  if (absl::IsCancelled(message.status())) return kExitInterrupted;
  if (!message.ok()) {
    terminal.err << "error: " << message.status().message() << std::endl;
    return kExitUsage;
  }
  return session.Say(*std::move(message));
}

void RegisterChatCommand(CLI::App& app, int* exit_code) {
  CLI::App* chat = app.add_subcommand("chat", "Talk to a running server");
  const auto options = std::make_shared<ChatOptions>();
  chat->add_option("message", options->words,
                   "What to ask; \"-\": standard input. Without it: a conversation on a terminal, "
                   "standard input otherwise");
  AddConnectionOptions(*chat, &options->session.connection);
  chat->add_option("--system", options->session.system, "System message");
  AddRequestOptions(*chat, &options->session.request);
  chat->add_option("--reasoning", options->reasoning,
                   "Show the model's reasoning: auto (on a terminal), show, hide")
      ->capture_default_str();
  chat->add_flag("--raw", options->raw, "The answer's bytes alone, without a final line end");
  chat->add_flag("--json", options->json, "Every event of the stream as a line of JSON")
      ->excludes("--raw");
  chat->add_flag("--stats", options->session.stats, "Tokens and speed on standard error");
  chat->callback([options, exit_code] {
    const char* no_color = std::getenv("NO_COLOR");
    *exit_code = RunChat(*options, {.in_fd = STDIN_FILENO,
                                    .in_is_terminal = isatty(STDIN_FILENO) != 0,
                                    .out_is_terminal = isatty(STDOUT_FILENO) != 0,
                                    .no_color = no_color != nullptr && *no_color != '\0',
                                    .out = std::cout,
                                    .err = std::cerr});
  });
}

}  // namespace latentd
