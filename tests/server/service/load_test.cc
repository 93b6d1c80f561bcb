// Many clients, and bad ones.

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "tests/scheduler/fake_engine.h"
#include "tests/server/service/service_fixture.h"

namespace latentd {
namespace {

constexpr TokenId kEos = 1;

ServiceUnderTest::Options RoomFor(int num_requests) {
  ServiceUnderTest::Options options;
  options.scheduler.max_running = num_requests;
  options.scheduler.max_waiting = num_requests;
  return options;
}

// Reads answers on one completion queue.
class ManyStreams {
 public:
  ManyStreams(v1::InferenceService::Stub& stub, const std::vector<v1::ChatRequest>& requests) {
    for (const v1::ChatRequest& request : requests) {
      auto stream = std::make_unique<Stream>();
      stream->reader = stub.AsyncStreamChat(&stream->context, request, &queue_, stream.get());
      streams_.push_back(std::move(stream));
    }
  }

  // The answers, in the order of the requests.
  std::vector<Streamed> Finish() {
    void* tag;
    bool ok;
    for (size_t finished = 0; finished < streams_.size() && queue_.Next(&tag, &ok);) {
      Stream* stream = static_cast<Stream*>(tag);
      if (stream->finishing) {
        ++finished;
        continue;
      }
      if (ok && stream->started) stream->result.events.push_back(stream->event);
      stream->started = true;
      if (ok) {
        stream->reader->Read(&stream->event, stream);
      } else {
        stream->finishing = true;
        stream->reader->Finish(&stream->result.status, stream);
      }
    }
    queue_.Shutdown();
    while (queue_.Next(&tag, &ok)) {
    }
    std::vector<Streamed> results;
    for (auto& stream : streams_) results.push_back(std::move(stream->result));
    return results;
  }

 private:
  struct Stream {
    grpc::ClientContext context;
    std::unique_ptr<grpc::ClientAsyncReader<v1::GenerationEvent>> reader;
    v1::GenerationEvent event;
    Streamed result;
    bool started = false;
    bool finishing = false;
  };
  grpc::CompletionQueue queue_;
  std::vector<std::unique_ptr<Stream>> streams_;
};

TEST(LoadTest, AThousandStreamsAtOnceEachGetTheirOwnAnswer) {
  constexpr int kStreams = 1000;
  FakeEngineOptions options;
  options.info = DemoEngineInfo();
  options.info.num_blocks = 8 * kStreams;
  options.info.max_sequences = kStreams;
  options.info.max_step_tokens = 8192;
  options.step_delay = absl::Milliseconds(5);
  FakeEngine engine(options);
  ServiceUnderTest under_test(&engine, RoomFor(kStreams));

  std::vector<v1::ChatRequest> requests;
  for (int i = 0; i < kStreams; ++i) {
    v1::ChatRequest request = UserSays(absl::StrCat("Question ", i));
    request.mutable_sampling()->set_seed(i);
    request.mutable_limits()->set_max_tokens(20);
    request.mutable_limits()->set_ignore_eos(true);
    request.mutable_outputs()->set_token_ids(true);
    requests.push_back(std::move(request));
  }
  const std::vector<Streamed> results = ManyStreams(under_test.stub(), requests).Finish();
  for (int i = 0; i < kStreams; ++i) {
    ASSERT_TRUE(results[i].status.ok()) << i << " " << results[i].status.error_message();
    // What the engine would have said to this request alone.
    Request request;
    request.prompt =
        Ids(absl::StrCat("<｜begin▁of▁sentence｜><｜User｜>Question ", i, "<｜Assistant｜>"));
    request.max_new_tokens = 20;
    request.sampling = {.temperature = 0.6f, .top_p = 0.95f, .seed = static_cast<uint64_t>(i)};
    std::vector<TokenId> ids;
    for (const auto& event : results[i].events) {
      ids.insert(ids.end(), event.delta().token_ids().begin(), event.delta().token_ids().end());
    }
    EXPECT_EQ(ids, engine.Expected(request)) << i;
  }
  EXPECT_TRUE(Eventually([&] { return under_test.service().num_active() == 0; }));
  const CoreStats stats = under_test.core().stats();
  EXPECT_EQ(stats.num_free_blocks, stats.num_blocks);
}

TEST(LoadTest, AThousandStreamsCancelledAtOnce) {
  constexpr int kStreams = 1000;
  FakeEngineOptions options;
  options.info = DemoEngineInfo();
  options.info.num_blocks = 8 * kStreams;
  options.info.max_sequences = kStreams;
  options.zero_compute = true;
  options.step_delay = absl::Milliseconds(5);
  FakeEngine engine(options);
  ServiceUnderTest under_test(&engine, RoomFor(kStreams));
  {
    std::vector<std::unique_ptr<grpc::ClientContext>> contexts;
    std::vector<std::unique_ptr<grpc::ClientReader<v1::GenerationEvent>>> readers;
    for (int i = 0; i < kStreams; ++i) {
      contexts.push_back(std::make_unique<grpc::ClientContext>());
      v1::ChatRequest request = UserSays(absl::StrCat("Question ", i));
      request.mutable_limits()->set_ignore_eos(true);
      request.mutable_limits()->set_max_tokens(400);
      readers.push_back(under_test.stub().StreamChat(contexts.back().get(), request));
    }
    for (auto& context : contexts) context->TryCancel();  // some run, some wait, some are prepared
    for (auto& reader : readers) {
      EXPECT_EQ(ReadAll(*reader).status.error_code(), grpc::StatusCode::CANCELLED);
    }
  }
  EXPECT_TRUE(Eventually([&] { return under_test.service().num_active() == 0; }));
  EXPECT_TRUE(Eventually([&] {
    const CoreStats stats = under_test.core().stats();
    return stats.num_running == 0 && stats.num_waiting == 0 &&
           stats.num_free_blocks == stats.num_blocks;
  }));
}

constexpr int kLongAnswer = 8000;  // tokens

// The token with the longest text, so that an answer is more than HTTP/2's flow control lets
// through to a client that does not read.
TokenId LongToken() {
  const Tokenizer& tokenizer = *DemoModel()->tokenizer;
  TokenId longest = Ids("a").front();
  for (TokenId id = 0; id < tokenizer.vocab_size(); ++id) {
    if (!tokenizer.IsAdded(id) &&
        tokenizer.TokenBytes(id).size() > tokenizer.TokenBytes(longest).size()) {
      longest = id;
    }
  }
  return longest;
}

// With a window that does not grow.
std::unique_ptr<v1::InferenceService::Stub> NewSleeper(ServiceUnderTest& under_test) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  arguments.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 16 << 10);
  return v1::InferenceService::NewStub(under_test.NewChannel(arguments));
}

v1::ChatRequest LongAnswer() {
  v1::ChatRequest request = UserSays("Go on.");
  request.mutable_limits()->set_max_tokens(kLongAnswer);
  request.mutable_limits()->set_ignore_eos(true);
  request.mutable_outputs()->set_token_ids(true);
  return request;
}

TEST(LoadTest, AClientThatDoesNotReadCostsNobodyElseAndGetsItsAnswerJoined) {
  ScriptedEngine engine(DemoEngineInfo());
  ServiceUnderTest under_test(&engine, RoomFor(64));
  engine.Say({LongToken()});
  grpc::ClientContext context;
  const auto stub = NewSleeper(under_test);
  const auto sleeper = stub->StreamChat(&context, LongAnswer());
  // Its answer is computed to the end all the same, and its blocks come back.
  ASSERT_TRUE(
      Eventually([&] { return under_test.observer().num_further_tokens() == kLongAnswer - 1; }));
  EXPECT_TRUE(Eventually([&] { return under_test.core().stats().num_running == 0; }));
  EXPECT_EQ(under_test.service().num_active(), 1);
  // Others, on the same connection, are served.
  v1::ChatRequest request = UserSays("Hello?");
  request.mutable_limits()->set_max_tokens(50);
  for (int i = 0; i < 10; ++i) ASSERT_TRUE(StreamChat(*stub, request).status.ok());

  const Streamed streamed = ReadAll(*sleeper);
  EXPECT_TRUE(streamed.status.ok());
  EXPECT_EQ(streamed.usage().completion_tokens(), kLongAnswer);
  int num_ids = 0;
  for (const auto& event : streamed.events) num_ids += event.delta().token_ids_size();
  EXPECT_EQ(num_ids, kLongAnswer);
  EXPECT_LT(streamed.num_deltas(), kLongAnswer);
  const TokenId token = LongToken();
  std::string expected;
  for (int i = 0; i < kLongAnswer; ++i) {
    expected += DemoModel()->tokenizer->Decode({&token, 1}, true);
  }
  EXPECT_EQ(streamed.content(), expected);
}

TEST(LoadTest, AClientThatNeverReadsCanBeCancelledAndAborted) {
  ScriptedEngine engine(DemoEngineInfo());
  engine.Say({LongToken()});
  ServiceUnderTest under_test(&engine, RoomFor(64));
  grpc::ClientContext context;
  const auto stub = NewSleeper(under_test);
  const auto sleeper = stub->StreamChat(&context, LongAnswer());
  ASSERT_TRUE(
      Eventually([&] { return under_test.observer().num_further_tokens() == kLongAnswer - 1; }));
  context.TryCancel();
  EXPECT_EQ(under_test.observer().AwaitFinished(1).code, absl::StatusCode::kCancelled);
  EXPECT_TRUE(Eventually([&] { return under_test.service().num_active() == 0; }));

  // The server's own shutdown, in the destructor, gets rid of one that is never cancelled.
  grpc::ClientContext second_context;
  const auto second = stub->StreamChat(&second_context, LongAnswer());
  ASSERT_TRUE(Eventually(
      [&] { return under_test.observer().num_further_tokens() == 2 * (kLongAnswer - 1); }));
  under_test.service().AbortAll(absl::UnavailableError("the drain took too long"));
}

}  // namespace
}  // namespace latentd
