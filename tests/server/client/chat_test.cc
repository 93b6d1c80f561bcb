#include "server/client/chat.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <csignal>
#include <sstream>
#include <thread>

#include "google/rpc/error_details.pb.h"
#include "tests/server/client/scripted_server.h"

namespace latentd {
namespace {

using testing::ElementsAre;
using testing::EndsWith;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::SizeIs;
using testing::StartsWith;

// Echoes the last message: "You said: ..." after a thought.
grpc::Status Echo(grpc::ServerContext&, const v1::ChatRequest& request,
                  ScriptedServer::Writer& writer) {
  const std::string& said = request.messages(request.messages_size() - 1).content();
  writer.Write(StartedEvent());
  writer.Write(ReasoningEvent("Hm."));
  writer.Write(ContentEvent("You said: "));
  writer.Write(ContentEvent(said));
  writer.Write(FinishedEvent());
  writer.Write(UsageEvent(7, 0, 3, 1));
  return grpc::Status::OK;
}

// Writes until the client is gone.
grpc::Status Endless(grpc::ServerContext& context, const v1::ChatRequest&,
                     ScriptedServer::Writer& writer) {
  writer.Write(StartedEvent());
  while (!context.IsCancelled()) {
    writer.Write(ContentEvent("on and "));
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return grpc::Status::CANCELLED;
}

class ChatTest : public testing::Test {
 protected:
  ChatTest() {
    server_.on_stream_chat = Echo;
    options_.session.connection.target = server_.target();
    EXPECT_EQ(pipe2(in_, O_CLOEXEC), 0);
  }
  ~ChatTest() override {
    close(in_[0]);
    CloseInput();
  }

  void Type(const std::string& text) {
    EXPECT_EQ(write(in_[1], text.data(), text.size()), static_cast<ssize_t>(text.size()));
  }
  void CloseInput() {
    if (in_[1] >= 0) close(in_[1]);
    in_[1] = -1;
  }
  int Run(bool in_is_terminal = false, bool out_is_terminal = false) {
    return RunChat(options_, {.in_fd = in_[0],
                              .in_is_terminal = in_is_terminal,
                              .out_is_terminal = out_is_terminal,
                              .no_color = no_color_,
                              .out = out_,
                              .err = err_});
  }
  // A conversation in which all of `text` is typed, then Ctrl-D.
  int Converse(const std::string& text) {
    Type(text);
    CloseInput();
    return Run(/*in_is_terminal=*/true);
  }
  // What the server was told last: "role: content" each.
  std::vector<std::string> LastMessages() {
    std::vector<std::string> messages;
    const std::vector<v1::ChatRequest> chats = server_.chats();
    for (const v1::Message& message : chats.back().messages()) {
      messages.push_back(v1::Role_Name(message.role()).substr(5) + ": " + message.content());
    }
    return messages;
  }

  ScriptedServer server_;
  ChatOptions options_;
  int in_[2];
  bool no_color_ = false;
  std::ostringstream out_, err_;
};

TEST_F(ChatTest, AnswersOneMessage) {
  options_.words = {"What", "is", "MLA?"};
  options_.session.system = "Be brief.";
  EXPECT_EQ(Run(), kExitOk);
  EXPECT_EQ(out_.str(), "You said: What is MLA?\n");
  EXPECT_EQ(err_.str(), "");
  EXPECT_THAT(LastMessages(), ElementsAre("SYSTEM: Be brief.", "USER: What is MLA?"));
}

TEST_F(ChatTest, StyleFollowsTheTerminal) {
  options_.words = {"hi"};
  EXPECT_EQ(Run(false, /*out_is_terminal=*/true), kExitOk);
  EXPECT_EQ(out_.str(), "\x1b[2mHm.\x1b[0m\n\nYou said: hi\n");
  out_.str("");
  no_color_ = true;
  EXPECT_EQ(Run(false, true), kExitOk);
  EXPECT_EQ(out_.str(), "<think>\nHm.\n</think>\n\nYou said: hi\n");
  out_.str("");
  options_.reasoning = "hide";
  EXPECT_EQ(Run(false, true), kExitOk);
  EXPECT_EQ(out_.str(), "You said: hi\n");
  out_.str("");
  options_.reasoning = "show";
  EXPECT_EQ(Run(false, false), kExitOk);
  EXPECT_EQ(out_.str(), "<think>\nHm.\n</think>\n\nYou said: hi\n");
}

TEST_F(ChatTest, RawAndJson) {
  options_.words = {"hi"};
  options_.raw = true;
  EXPECT_EQ(Run(false, true), kExitOk);
  EXPECT_EQ(out_.str(), "You said: hi");
  options_.raw = false;
  options_.json = true;
  out_.str("");
  EXPECT_EQ(Run(), kExitOk);
  EXPECT_THAT(out_.str(), StartsWith("{\"started\":{"));
  EXPECT_THAT(out_.str(), HasSubstr("\n{\"delta\":{\"reasoning\":\"Hm.\""));
  EXPECT_THAT(out_.str(), HasSubstr("\n{\"usage\":{\"prompt_tokens\":7"));
}

TEST_F(ChatTest, ReadsStandardInputWithoutItsLastLineEnd) {
  Type("two\nlines\n");
  CloseInput();
  EXPECT_EQ(Run(), kExitOk);
  EXPECT_THAT(LastMessages(), ElementsAre("USER: two\nlines"));
}

TEST_F(ChatTest, DashIsStandardInput) {
  options_.words = {"-"};
  Type("piped");
  CloseInput();
  EXPECT_EQ(Run(/*in_is_terminal=*/true), kExitOk);
  EXPECT_THAT(LastMessages(), ElementsAre("USER: piped"));
}

TEST_F(ChatTest, RefusesWhatItCannotSend) {
  CloseInput();
  EXPECT_EQ(Run(), kExitUsage);
  EXPECT_EQ(err_.str(), "error: the message is empty\n");
  err_.str("");
  options_.words = {"\xff"};
  EXPECT_EQ(Run(), kExitUsage);
  EXPECT_EQ(err_.str(), "error: the message is not valid UTF-8\n");
  err_.str("");
  options_.words = {"hi"};
  options_.reasoning = "maybe";
  EXPECT_EQ(Run(), kExitUsage);
  EXPECT_EQ(err_.str(), "error: --reasoning is 'maybe'; known are: auto, show, hide\n");
  EXPECT_THAT(server_.chats(), IsEmpty());
}

TEST_F(ChatTest, StatsGoToStandardError) {
  options_.words = {"hi"};
  options_.session.stats = true;
  EXPECT_EQ(Run(), kExitOk);
  EXPECT_THAT(err_.str(), StartsWith("7 prompt tokens (0 cached), 3 completion tokens"));
  EXPECT_THAT(err_.str(), EndsWith("finish: stop\n"));
}

TEST_F(ChatTest, PrintsAnErrorInOneLine) {
  server_.on_stream_chat = [](auto&, const auto&, auto&) {
    google::rpc::BadRequest bad;
    auto* violation = bad.add_field_violations();
    violation->set_field("sampling.temperature");
    violation->set_description("3 is not in [0, 2]");
    return StatusWithDetails(grpc::StatusCode::INVALID_ARGUMENT, "bad request", {&bad});
  };
  options_.words = {"hi"};
  EXPECT_EQ(Run(), kExitFailed);
  EXPECT_EQ(out_.str(), "");
  EXPECT_EQ(err_.str(),
            "error: INVALID_ARGUMENT: bad request (sampling.temperature: 3 is not in [0, 2])\n");
}

TEST_F(ChatTest, AnErrorAmidTheAnswerKeepsWhatCameAndIsNotRetried) {
  server_.on_stream_chat = [](auto&, const auto&, auto& writer) {
    writer.Write(ContentEvent("Half an"));
    return LoadingStatus(10);
  };
  options_.words = {"hi"};
  EXPECT_EQ(Run(), kExitFailed);
  EXPECT_EQ(out_.str(), "Half an\n");
  EXPECT_THAT(err_.str(), StartsWith("error: UNAVAILABLE: the model is loading"));
  EXPECT_THAT(server_.chats(), SizeIs(1));
}

TEST_F(ChatTest, AStreamWithoutItsEndIsAnError) {
  server_.on_stream_chat = [](auto&, const auto&, auto& writer) {
    writer.Write(ContentEvent("Half an"));
    return grpc::Status::OK;
  };
  options_.words = {"hi"};
  EXPECT_EQ(Run(), kExitFailed);
  EXPECT_EQ(err_.str(), "error: DATA_LOSS: the stream ended before the answer was complete\n");
}

TEST_F(ChatTest, WaitsForALoadingServer) {
  std::atomic<int> calls = 0;
  server_.on_stream_chat = [&](auto& context, const auto& request, auto& writer) {
    return ++calls < 3 ? LoadingStatus(100) : Echo(context, request, writer);
  };
  options_.words = {"hi"};
  EXPECT_EQ(Run(), kExitOk);
  EXPECT_EQ(out_.str(), "You said: hi\n");
  EXPECT_EQ(err_.str(), "waiting for " + server_.target() + ": the model is loading\n");
}

TEST_F(ChatTest, NobodyThereIsAnErrorAtOnce) {
  options_.words = {"hi"};
  options_.session.connection.target = "127.0.0.1:1";
  EXPECT_EQ(Run(), kExitFailed);
  EXPECT_THAT(err_.str(), StartsWith("error: UNAVAILABLE: "));
}

TEST_F(ChatTest, CtrlCStopsTheAnswerAndTheCall) {
  server_.on_stream_chat = Endless;
  options_.words = {"hi"};
  std::thread ctrl_c([this] {
    while (server_.chats().empty()) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    kill(getpid(), SIGINT);
  });
  EXPECT_EQ(Run(), kExitInterrupted);
  ctrl_c.join();
  EXPECT_THAT(out_.str(), StartsWith("on and on and "));
  EXPECT_EQ(err_.str(), "");
  for (int i = 0; i < 200 && server_.num_cancelled == 0; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  EXPECT_EQ(server_.num_cancelled, 1);
}

TEST_F(ChatTest, AReaderThatIsGoneEndsTheCall) {
  server_.on_stream_chat = Endless;
  options_.words = {"hi"};
  out_.setstate(std::ios::badbit);
  EXPECT_EQ(Run(), kExitFailed);
  EXPECT_EQ(err_.str(), "error: cannot write the answer to standard output\n");
}

TEST_F(ChatTest, ConversationRemembers) {
  EXPECT_EQ(Converse("one\n\n  \ntwo\n"), kExitOk);
  EXPECT_EQ(out_.str(), "You said: one\nYou said: two\n");
  // Reasoning is not sent back.
  EXPECT_THAT(LastMessages(), ElementsAre("USER: one", "ASSISTANT: You said: one", "USER: two"));
}

TEST_F(ChatTest, CommandsOfAConversation) {
  EXPECT_EQ(Converse("/retry\none\n/retry\n/system Be brief.\ntwo\n/thinking on\n/reset\nthree\n"
                     "/thinking maybe\n/nonsense\n/help\n/exit\nnever said\n"),
            kExitOk);
  EXPECT_EQ(out_.str(), "You said: one\nYou said: one\nYou said: two\nYou said: three\n");
  const auto chats = server_.chats();
  ASSERT_THAT(chats, SizeIs(4));
  EXPECT_EQ(chats[1].messages_size(), 1);  // retried without the first answer
  EXPECT_FALSE(chats[2].has_thinking());
  EXPECT_TRUE(chats[3].thinking());
  EXPECT_THAT(LastMessages(), ElementsAre("SYSTEM: Be brief.", "USER: three"));
  EXPECT_THAT(err_.str(), HasSubstr("nothing to retry"));
  EXPECT_THAT(err_.str(), HasSubstr("/thinking takes on, off or auto"));
  EXPECT_THAT(err_.str(), HasSubstr("unknown command /nonsense"));
  EXPECT_THAT(err_.str(), HasSubstr("/reset             start over"));
}

TEST_F(ChatTest, MessagesOfSeveralLines) {
  EXPECT_EQ(Converse("\"\"\"\nfirst\n/not a command\n\"\"\"\n"), kExitOk);
  EXPECT_THAT(LastMessages(), ElementsAre("USER: first\n/not a command"));
}

TEST_F(ChatTest, AMessageWithoutAnAnswerIsReplacedOrRetried) {
  std::atomic<int> calls = 0;
  server_.on_stream_chat = [&](auto& context, const auto& request, auto& writer) {
    const int call = ++calls;
    if (call <= 2) return grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "queue is full");
    return Echo(context, request, writer);
  };
  EXPECT_EQ(Converse("one\ntwo\n/retry\nthree\n"), kExitOk);
  EXPECT_THAT(err_.str(), HasSubstr("error: RESOURCE_EXHAUSTED: queue is full"));
  EXPECT_THAT(LastMessages(), ElementsAre("USER: two", "ASSISTANT: You said: two", "USER: three"));
}

TEST_F(ChatTest, CtrlCInAConversationStopsTheAnswerNotTheProgram) {
  std::atomic<int> calls = 0;
  server_.on_stream_chat = [&](auto& context, const auto& request, auto& writer) {
    return ++calls == 1 ? Endless(context, request, writer) : Echo(context, request, writer);
  };
  std::thread user([this] {
    Type("one\n");
    while (server_.chats().empty()) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    kill(getpid(), SIGINT);
    while (server_.num_cancelled == 0) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    kill(getpid(), SIGINT);  // at the prompt: nothing to stop
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    Type("two\n");
    CloseInput();
  });
  EXPECT_EQ(Run(/*in_is_terminal=*/true), kExitOk);
  user.join();
  EXPECT_THAT(err_.str(), HasSubstr("[stopped]"));
  EXPECT_THAT(out_.str(), EndsWith("You said: two\n"));
  // What came of the first answer stays in the history.
  EXPECT_THAT(LastMessages(),
              ElementsAre("USER: one", StartsWith("ASSISTANT: on and "), "USER: two"));
}

TEST_F(ChatTest, CommandLineFillsTheRequest) {
  CLI::App app;
  int exit_code = -1;
  RegisterChatCommand(app, &exit_code);
  app.parse("chat --target " + server_.target() +
            " --system Brief --model m --temperature 0.5 --top-p 0.9 --top-k 40 --min-p 0.1 "
            "--seed 18446744073709551615 --max-tokens 7 --stop A --stop B --no-thinking "
            "--reasoning hide hello world");
  EXPECT_EQ(exit_code, kExitOk);
  const auto chats = server_.chats();
  ASSERT_THAT(chats, SizeIs(1));
  const v1::ChatRequest& chat = chats[0];
  EXPECT_EQ(chat.model(), "m");
  EXPECT_FLOAT_EQ(chat.sampling().temperature(), 0.5f);
  EXPECT_FLOAT_EQ(chat.sampling().top_p(), 0.9f);
  EXPECT_EQ(chat.sampling().top_k(), 40);
  EXPECT_FLOAT_EQ(chat.sampling().min_p(), 0.1f);
  EXPECT_EQ(chat.sampling().seed(), 18446744073709551615u);
  EXPECT_EQ(chat.limits().max_tokens(), 7);
  EXPECT_THAT(chat.limits().stop(), ElementsAre("A", "B"));
  EXPECT_TRUE(chat.has_thinking());
  EXPECT_FALSE(chat.thinking());
  EXPECT_THAT(LastMessages(), ElementsAre("SYSTEM: Brief", "USER: hello world"));
}

TEST_F(ChatTest, CommandLineLeavesDefaultsToTheModel) {
  CLI::App app;
  int exit_code = -1;
  RegisterChatCommand(app, &exit_code);
  app.parse("chat --target " + server_.target() + " hello");
  EXPECT_EQ(exit_code, kExitOk);
  const v1::ChatRequest chat = server_.chats().at(0);
  EXPECT_FALSE(chat.sampling().has_temperature());
  EXPECT_FALSE(chat.sampling().has_seed());
  EXPECT_FALSE(chat.limits().has_max_tokens());
  EXPECT_FALSE(chat.has_thinking());
}

TEST_F(ChatTest, CommandLineRefusesContradictions) {
  for (const char* line : {"chat --thinking --no-thinking hi", "chat --raw --json hi",
                           "chat --temperature warm hi", "chat --top-k 1.5 hi", "chat --unknown"}) {
    CLI::App app;
    int exit_code = -1;
    RegisterChatCommand(app, &exit_code);
    EXPECT_THROW(app.parse(line), CLI::ParseError) << line;
    EXPECT_EQ(exit_code, -1);
  }
}

}  // namespace
}  // namespace latentd
