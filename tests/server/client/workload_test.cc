#include "server/client/workload.h"

#include <gmock/gmock.h>
#include <grpcpp/support/slice.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <set>

namespace latentd {
namespace {

using testing::HasSubstr;

v1::Model TestModel() {
  v1::Model model;
  model.set_name("m");
  model.set_vocab_size(1000);
  model.set_max_model_len(512);
  return model;
}

BenchOptions Finished(BenchOptions options) {
  EXPECT_TRUE(FinishBenchOptions(&options).ok());
  return options;
}

template <typename Request>
Request Parsed(const grpc::ByteBuffer& buffer) {
  grpc::Slice slice;
  EXPECT_TRUE(buffer.DumpToSingleSlice(&slice).ok());
  Request request;
  EXPECT_TRUE(request.ParseFromArray(slice.begin(), static_cast<int>(slice.size())));
  return request;
}

std::vector<int32_t> Ids(const Workload& workload, int64_t index) {
  const auto request = Parsed<v1::CompleteRequest>(workload.At(index).request);
  return {request.tokens().ids().begin(), request.tokens().ids().end()};
}

TEST(WorkloadTest, AsksForExactLengths) {
  const Workload workload = Workload::Make(Finished({.prompt_tokens = "10:20",
                                                     .output_tokens = "7",
                                                     .temperature = 0.5f,
                                                     .cache_salt = "salt"}),
                                           TestModel())
                                .value();
  EXPECT_EQ(workload.method(), "/latentd.v1.InferenceService/StreamComplete");
  std::set<int64_t> lengths;
  for (int64_t i = 0; i < 200; ++i) {
    const Workload::Item item = workload.At(i);
    const auto request = Parsed<v1::CompleteRequest>(item.request);
    EXPECT_EQ(request.tokens().ids_size(), item.prompt_tokens);
    lengths.insert(item.prompt_tokens);
    for (const int32_t id : request.tokens().ids()) {
      EXPECT_GE(id, 0);
      EXPECT_LT(id, 1000);
    }
    EXPECT_EQ(item.output_tokens, 7);
    EXPECT_EQ(request.limits().max_tokens(), 7);
    EXPECT_TRUE(request.limits().ignore_eos());
    EXPECT_TRUE(request.outputs().token_ids());
    EXPECT_TRUE(request.sampling().has_seed());
    EXPECT_EQ(request.sampling().temperature(), 0.5f);
    EXPECT_EQ(request.serving().cache_salt(), "salt");
  }
  EXPECT_EQ(lengths.size(), 11u);
  EXPECT_EQ(*lengths.begin(), 10);
}

TEST(WorkloadTest, IsAFunctionOfSeedAndIndex) {
  const auto make = [](uint64_t seed) {
    return Workload::Make(Finished({.seed = seed}), TestModel()).value();
  };
  const Workload a = make(1), b = make(1), c = make(2);
  std::set<std::vector<int32_t>> prompts;
  for (int64_t i = -50; i < 50; ++i) {
    EXPECT_EQ(Ids(a, i), Ids(b, i));
    EXPECT_NE(Ids(a, i), Ids(c, i));
    prompts.insert(Ids(a, i));
  }
  EXPECT_EQ(prompts.size(), 100u);
}

TEST(WorkloadTest, SharesAPrefix) {
  const Workload workload =
      Workload::Make(Finished({.prompt_tokens = "100", .prefix_share = 0.6}), TestModel()).value();
  const std::vector<int32_t> a = Ids(workload, 0), b = Ids(workload, 1);
  EXPECT_TRUE(std::equal(a.begin(), a.begin() + 60, b.begin()));
  EXPECT_NE(a[60], b[60]);
  const Workload whole =
      Workload::Make(Finished({.prompt_tokens = "100", .prefix_share = 1}), TestModel()).value();
  EXPECT_EQ(Ids(whole, 0), Ids(whole, 1));
}

TEST(WorkloadTest, KeepsWithinTheModelsLength) {
  const Workload workload =
      Workload::Make(
          Finished({.prompt_tokens = "lognormal:300,2", .output_tokens = "normal:300,200"}),
          TestModel())
          .value();
  for (int64_t i = 0; i < 1000; ++i) {
    const Workload::Item item = workload.At(i);
    EXPECT_GE(item.prompt_tokens, 1);
    EXPECT_GE(item.output_tokens, 1);
    EXPECT_LE(item.prompt_tokens + item.output_tokens, 512);
  }
}

TEST(WorkloadTest, RefusesWhatTheModelCannotHold) {
  const auto workload =
      Workload::Make(Finished({.prompt_tokens = "100:500", .output_tokens = "13"}), TestModel());
  EXPECT_EQ(workload.status().message(),
            "--prompt-tokens 100:500 and --output-tokens 13 need up to 513 tokens; the model's "
            "max_model_len is 512");
  EXPECT_TRUE(
      Workload::Make(Finished({.prompt_tokens = "100:500", .output_tokens = "12"}), TestModel())
          .ok());
  EXPECT_FALSE(Workload::Make(Finished({}), v1::Model()).ok());
}

class PromptsFileTest : public testing::Test {
 protected:
  PromptsFileTest() : path_(testing::TempDir() + "/prompts.jsonl") {}
  ~PromptsFileTest() override { std::filesystem::remove(path_); }
  absl::StatusOr<Workload> Make(const std::string& text, std::string output_tokens = "") {
    std::ofstream(path_) << text;
    return Workload::Make(
        Finished({.output_tokens = std::move(output_tokens), .prompts = path_, .unary = true}),
        TestModel());
  }

  const std::string path_;
};

TEST_F(PromptsFileTest, LinesAreMessagesOrRequests) {
  const Workload workload =
      Make(
          "What is MLA?\r\n\n"
          R"({"messages":[{"role":"ROLE_SYSTEM","content":"Be brief."},)"
          R"({"role":"ROLE_USER","content":"Hi"}],"limits":{"max_tokens":3},"thinking":true})"
          "\n")
          .value();
  EXPECT_EQ(workload.method(), "/latentd.v1.InferenceService/Chat");
  const auto first = Parsed<v1::ChatRequest>(workload.At(0).request);
  EXPECT_EQ(first.messages(0).content(), "What is MLA?");
  EXPECT_EQ(first.messages(0).role(), v1::ROLE_USER);
  EXPECT_FALSE(first.limits().has_max_tokens());
  EXPECT_FALSE(first.limits().ignore_eos());
  const auto second = Parsed<v1::ChatRequest>(workload.At(1).request);
  EXPECT_EQ(second.messages_size(), 2);
  EXPECT_EQ(second.limits().max_tokens(), 3);
  EXPECT_TRUE(second.thinking());
  // Around again, also backwards.
  EXPECT_EQ(Parsed<v1::ChatRequest>(workload.At(2).request).messages_size(), 1);
  EXPECT_EQ(Parsed<v1::ChatRequest>(workload.At(-1).request).messages_size(), 2);
}

TEST_F(PromptsFileTest, OutputTokensReplaceTheRequestsLimits) {
  const Workload workload = Make("Hi\n", "9").value();
  EXPECT_EQ(workload.At(0).output_tokens, 9);
  const auto request = Parsed<v1::ChatRequest>(workload.At(0).request);
  EXPECT_EQ(request.limits().max_tokens(), 9);
  EXPECT_TRUE(request.limits().ignore_eos());
}

TEST_F(PromptsFileTest, RefusesWithFileAndLine) {
  EXPECT_THAT(Make("ok\n{\"messages\": 5}\n").status().ToString(),
              HasSubstr("--prompts: line 2 of " + path_ + " is no ChatRequest"));
  EXPECT_THAT(Make("{\"mesages\": []}\n").status().ToString(), HasSubstr("mesages"));
  EXPECT_THAT(Make("\n\n").status().ToString(), HasSubstr("is empty"));
  EXPECT_THAT(
      Workload::Make(Finished({.prompts = "/nonexistent/file"}), TestModel()).status().ToString(),
      HasSubstr("--prompts: cannot open /nonexistent/file"));
}

}  // namespace
}  // namespace latentd
