#include "server/log.h"

#include <sstream>
#include <string>

#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace latentd {
namespace {

TEST(LogTest, TextIsKeyValue) {
  EXPECT_EQ(FormatRecord(LogFormat::kText, "request",
                         {{"id", "req-1"}, {"tokens", 12}, {"ttft_ms", 1.25}, {"ok", true}}),
            "request id=req-1 tokens=12 ttft_ms=1.250 ok=true");
}

TEST(LogTest, AValueCannotForgeAFieldOrALine) {
  EXPECT_EQ(FormatRecord(LogFormat::kText, "request", {{"id", "a code=OK\nfailed"}}),
            "request id=\"a code=OK\\nfailed\"");
  EXPECT_EQ(FormatRecord(LogFormat::kText, "request", {{"id", ""}, {"quote", "\""}}),
            "request id=\"\" quote=\"\\\"\"");
  EXPECT_EQ(FormatRecord(LogFormat::kText, "two\nlines", {}), "two lines");
}

TEST(LogTest, JsonIsAlwaysValid) {
  const std::string hostile = "\" , \\ \x01 \n \xff ü";
  const std::string record = FormatRecord(
      LogFormat::kJson, hostile, {{"id", hostile}, {"tokens", 12}, {"ms", 0.5}, {"ok", false}});
  const nlohmann::json json = nlohmann::json::parse("{" + record + "}", nullptr, false);
  ASSERT_TRUE(json.is_object()) << record;
  EXPECT_EQ(json["tokens"], 12);
  EXPECT_EQ(json["ms"], 0.5);
  EXPECT_EQ(json["ok"], false);
  EXPECT_EQ(json["id"], json["msg"]);
  EXPECT_EQ(record.find('\n'), std::string::npos);
}

TEST(LogTest, RecordsGoToStandardError) {
  ::testing::internal::CaptureStderr();
  InitLogging(LogFormat::kJson, "info");
  LogEvent(spdlog::level::debug, "hidden", {});
  LogEvent(spdlog::level::info, "shown", {{"n", 1}});
  spdlog::warn("free \"text\"");
  ShutdownLogging();
  const std::string output = ::testing::internal::GetCapturedStderr();
  const size_t end = output.find('\n');
  ASSERT_NE(end, std::string::npos);
  const nlohmann::json first = nlohmann::json::parse(output.substr(0, end));
  EXPECT_EQ(first["msg"], "shown");
  EXPECT_EQ(first["level"], "info");
  EXPECT_EQ(first["n"], 1);
  EXPECT_TRUE(first["time"].get<std::string>().ends_with("Z"));
  const nlohmann::json second = nlohmann::json::parse(output.substr(end + 1));
  EXPECT_EQ(second["msg"], "free \"text\"");
  LogEvent(spdlog::level::info, "after the end", {});  // goes nowhere, and does no harm
}

TEST(LogTest, EveryRecordNamesItsProcess) {
  ::testing::internal::CaptureStderr();
  InitLogging(LogFormat::kJson, "info", {{"rank", 3}, {"node", "a b"}});
  LogEvent(spdlog::level::info, "shown", {{"n", 1}});
  spdlog::warn("free");
  ShutdownLogging();
  std::istringstream lines(::testing::internal::GetCapturedStderr());
  int count = 0;
  for (std::string line; std::getline(lines, line); ++count) {
    const nlohmann::json record = nlohmann::json::parse(line);
    EXPECT_EQ(record["rank"], 3) << line;
    EXPECT_EQ(record["node"], "a b") << line;
  }
  EXPECT_EQ(count, 2);

  ::testing::internal::CaptureStderr();
  InitLogging(LogFormat::kText, "info", {{"rank", 12}});
  LogEvent(spdlog::level::info, "shown", {{"n", 1}});
  ShutdownLogging();
  EXPECT_TRUE(::testing::internal::GetCapturedStderr().ends_with("shown n=1 rank=12\n"));
}

}  // namespace
}  // namespace latentd
