#include "server/client/bench_options.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <CLI/CLI.hpp>
#include <cmath>
#include <functional>

namespace latentd {
namespace {

using testing::HasSubstr;

TEST(TokenCountTest, FixedAndRange) {
  Random random(1);
  const TokenCount fixed = TokenCount::Parse("--prompt-tokens", "512").value();
  EXPECT_EQ(fixed.Sample(random, 4096), 512);
  EXPECT_EQ(fixed.max(), 512);
  const TokenCount range = TokenCount::Parse("--prompt-tokens", "3:6").value();
  std::vector<int> seen(8);
  for (int i = 0; i < 4000; ++i) ++seen.at(range.Sample(random, 4096));
  for (int i = 3; i <= 6; ++i) EXPECT_NEAR(seen[i], 1000, 150);
}

TEST(TokenCountTest, NormalAndLogNormalStayWithinTheirLimits) {
  Random random(1);
  const TokenCount normal = TokenCount::Parse("--prompt-tokens", "normal:200,50").value();
  const TokenCount lognormal = TokenCount::Parse("--prompt-tokens", "lognormal:200,1").value();
  EXPECT_FALSE(normal.max().has_value());
  double sum = 0;
  int below_median = 0;
  for (int i = 0; i < 20'000; ++i) {
    const int64_t a = normal.Sample(random, 300);
    EXPECT_GE(a, 1);
    EXPECT_LE(a, 300);
    sum += static_cast<double>(normal.Sample(random, 100'000));
    const int64_t b = lognormal.Sample(random, 100'000);
    EXPECT_GE(b, 1);
    below_median += b < 200;
  }
  EXPECT_NEAR(sum / 20'000, 200, 2);
  EXPECT_NEAR(below_median, 10'000, 500);
  // exp(1e7 * x) is infinite for half of all x.
  const TokenCount wild = TokenCount::Parse("--prompt-tokens", "lognormal:1,10000000").value();
  for (int i = 0; i < 100; ++i) {
    const int64_t count = wild.Sample(random, 77);
    EXPECT_GE(count, 1);
    EXPECT_LE(count, 77);
  }
}

TEST(TokenCountTest, RefusesByNameValueAndLimit) {
  const std::pair<const char*, const char*> cases[] = {
      {"", "not a number or a range"},
      {"12x", "not a number or a range"},
      {"1:2:3", "not a number or a range"},
      {"9:3", "the range is empty"},
      {"0", "must lie in [1, 16777216]"},
      {"-4", "must lie in [1, 16777216]"},
      {"1:99999999", "must lie in [1, 16777216]"},
      {"99999999999999999999", "not a number or a range"},
      {"normal:5", "needs two numbers"},
      {"normal:0,1", "the first number must lie in [1, 16777216]"},
      {"normal:nan,1", "the first number must lie in [1, 16777216]"},
      {"lognormal:5,-1", "the second must lie in [0, 16777216]"},
      {"lognormal:5,inf", "the second must lie in [0, 16777216]"},
  };
  for (const auto& [text, why] : cases) {
    const auto count = TokenCount::Parse("--output-tokens", text);
    ASSERT_FALSE(count.ok()) << text;
    EXPECT_THAT(count.status().ToString(),
                HasSubstr("--output-tokens is '" + std::string(text) + "': " + why));
  }
}

TEST(BenchOptionsTest, FillsDefaults) {
  BenchOptions options;
  ASSERT_TRUE(FinishBenchOptions(&options).ok());
  EXPECT_EQ(options.concurrency, 16);
  EXPECT_EQ(options.num_requests, 100);
  EXPECT_EQ(options.output_tokens, "128");
  EXPECT_EQ(options.connections, 1);

  BenchOptions many = {.concurrency = 2048, .duration_s = 5, .threads = 2};
  ASSERT_TRUE(FinishBenchOptions(&many).ok());
  EXPECT_EQ(many.connections, 8);
  EXPECT_EQ(many.num_requests, 0);

  BenchOptions open = {.request_rate = 2.5};
  ASSERT_TRUE(FinishBenchOptions(&open).ok());
  EXPECT_EQ(open.concurrency, 0);

  BenchOptions chats = {.prompts = "chats.jsonl"};
  ASSERT_TRUE(FinishBenchOptions(&chats).ok());
  EXPECT_EQ(chats.output_tokens, "");
}

TEST(BenchOptionsTest, RefusesByNameValueAndLimit) {
  const std::pair<std::function<void(BenchOptions&)>, const char*> cases[] = {
      {[](BenchOptions& o) { o.concurrency = -1; },
       "--concurrency is -1; it must lie in [1, 65536]"},
      {[](BenchOptions& o) { o.concurrency = 65537; },
       "--concurrency is 65537; it must lie in [1, 65536]"},
      {[](BenchOptions& o) { o.request_rate = -2; }, "--request-rate is -2; it must lie in"},
      {[](BenchOptions& o) { o.request_rate = std::nan(""); }, "--request-rate is nan"},
      {[](BenchOptions& o) { o.concurrency = o.request_rate = 1; },
       "--concurrency and --request-rate exclude one another"},
      {[](BenchOptions& o) { o.arrivals = "weekly"; },
       "--arrivals is 'weekly'; known are: poisson, constant"},
      {[](BenchOptions& o) { o.num_requests = -5; }, "--num-requests is -5; it must lie in"},
      {[](BenchOptions& o) { o.duration_s = -1; }, "--duration is -1; it must lie in [0, 86400]"},
      {[](BenchOptions& o) { o.warmup = -1; }, "--warmup is -1; it must lie in [0, 1000000]"},
      {[](BenchOptions& o) { o.timeout_s = 0; }, "--timeout is 0; it must lie in [0.001, 86400]"},
      {[](BenchOptions& o) { o.prefix_share = 1.5; },
       "--prefix-share is 1.5; it must lie in [0, 1]"},
      {[](BenchOptions& o) { o.max_error_rate = 2; },
       "--max-error-rate is 2; it must lie in [0, 1]"},
      {[](BenchOptions& o) { o.threads = 0; }, "--threads is 0; it must lie in [1, 64]"},
      {[](BenchOptions& o) {
         o.threads = 4;
         o.connections = 2;
       },
       "--connections is 2; it must lie in [4, 1024]"},
      {[](BenchOptions& o) {
         o.prompts = "f";
         o.prefix_share = 0.5;
       },
       "--prompts excludes it"},
      {[](BenchOptions& o) { o.prompt_tokens = "many"; }, "--prompt-tokens is 'many'"},
      {[](BenchOptions& o) { o.output_tokens = "0"; }, "--output-tokens is '0'"},
      {[](BenchOptions& o) { o.connection.target = ""; }, "--target is empty"},
  };
  for (const auto& [change, message] : cases) {
    BenchOptions options;
    change(options);
    EXPECT_THAT(FinishBenchOptions(&options).ToString(), HasSubstr(message));
  }
}

TEST(BenchOptionsTest, CommandLine) {
  CLI::App app;
  BenchOptions options;
  AddBenchOptions(app, &options);
  app.parse(
      "--target h:1 --model m --request-rate 3.5 --arrivals constant --num-requests 10 --duration "
      "2 "
      "--warmup 3 --timeout 9 --seed 5 --prompt-tokens 1:2 --output-tokens 4 --prefix-share 0.5 "
      "--temperature 0 --cache-salt s --unary --no-token-ids --connections 2 --threads 2 "
      "--max-error-rate 0.1 --output f --quiet --wait 4");
  EXPECT_EQ(options.connection.target, "h:1");
  EXPECT_EQ(options.connection.wait_s, 4);
  EXPECT_EQ(options.request_rate, 3.5);
  EXPECT_EQ(options.arrivals, "constant");
  EXPECT_EQ(options.temperature, 0.0f);
  EXPECT_TRUE(options.unary);
  EXPECT_FALSE(options.token_ids);
  EXPECT_TRUE(options.quiet);
  EXPECT_EQ(options.output, "f");
  EXPECT_EQ(options.max_error_rate, 0.1);
}

TEST(BenchOptionsTest, CommandLineRefusesContradictions) {
  for (const char* line : {"--concurrency 2 --request-rate 1", "--stream --unary", "--seed x"}) {
    CLI::App app;
    BenchOptions options;
    AddBenchOptions(app, &options);
    EXPECT_THROW(app.parse(line), CLI::ParseError) << line;
  }
}

}  // namespace
}  // namespace latentd
