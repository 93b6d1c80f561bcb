#include "server/client/batch.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <google/protobuf/util/json_util.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>

#include "google/rpc/error_details.pb.h"
#include "server/client/batch_watch.h"
#include "tests/server/client/fake_batch_server.h"
#include "tests/server/client/scripted_server.h"

namespace latentd {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::EndsWith;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::SizeIs;
using testing::StartsWith;

constexpr char kJob[] = "jobs/0123456789abcdef0123456789abcdef";

// A line of OpenAI's format.
std::string ItemLine(const std::string& custom_id, const std::string& text = "Hi") {
  return R"({"custom_id": ")" + custom_id +
         R"(", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [{"role": )" +
         R"("user", "content": ")" + text + R"("}], "max_tokens": 5}})" + "\n";
}

std::string ItemLines(int count) {
  std::string lines;
  for (int i = 0; i < count; ++i) lines += ItemLine("item-" + std::to_string(i));
  return lines;
}

class BatchTest : public testing::Test {
 protected:
  BatchTest() : folder_(testing::TempDir() + "batch_test_" + std::to_string(getpid())) {
    std::filesystem::create_directories(folder_);
    EXPECT_EQ(pipe2(in_, O_CLOEXEC), 0);
  }
  ~BatchTest() override {
    close(in_[0]);
    close(in_[1]);
    std::filesystem::remove_all(folder_);
  }

  // Runs `latentd batch WORDS`; the server's address is added.
  int Run(std::vector<std::string> words) {
    out_.str("");
    err_.str("");
    CLI::App app;
    int exit_code = -1;
    RegisterBatchCommand(
        app, {.in_fd = in_[0], .err_is_terminal = is_terminal_, .out = out_, .err = err_},
        &exit_code);
    words.insert(words.begin(), "batch");
    words.insert(words.end(), {"--target", server_.target(), "--wait", "20"});
    std::reverse(words.begin(), words.end());
    // What the test and the server's threads did is seen by each other: gRPC's own order of it is
    // not one that ThreadSanitizer knows.
    server_.lock();
    app.parse(words);
    server_.lock();
    return exit_code;
  }
  std::string Write(const std::string& name, const std::string& text) {
    std::ofstream(Path(name)) << text;
    return Path(name);
  }
  std::string Path(const std::string& name) const { return folder_ + "/" + name; }
  static std::string Contents(const std::string& path) {
    std::ifstream file(path);
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
  }
  // Results of items with the numbers [0, count); every third failed.
  void AddResults(int count) {
    const auto held = server_.lock();
    for (int i = 0; i < count; ++i) {
      v1::ItemResult& result = server_.results.emplace_back();
      result.set_index(i);
      result.set_custom_id("item-" + std::to_string(i));
      if (i % 3 == 2) {
        result.set_state(v1::ITEM_STATE_FAILED);
        result.mutable_error()->set_code(3);
      } else {
        result.set_state(v1::ITEM_STATE_SUCCEEDED);
        result.mutable_chat()->add_choices()->mutable_message()->set_content("Yes.");
      }
    }
  }
  void SetJob(v1::JobState state, int64_t total, int64_t succeeded, int64_t failed = 0) {
    const auto held = server_.lock();
    server_.jobs[kJob] = MakeJob(kJob, state, total, succeeded);
    server_.jobs[kJob].mutable_counts()->set_failed(failed);
  }

  FakeBatchServer server_;
  const std::string folder_;
  int in_[2];
  bool is_terminal_ = false;
  std::ostringstream out_, err_;
};

// ---- submit -----------------------------------------------------------------------------------

TEST_F(BatchTest, SubmitSendsTheFileAndPrintsTheName) {
  const std::string file =
      Write("in.jsonl", "\xef\xbb\xbf" + ItemLine("a", "One") + "\n \r\n" +
                            R"({"custom_id": "b", "complete": {"text": "Two"}})");
  EXPECT_EQ(Run({"submit", file, "--priority", "-3", "--completion-window", "2d", "--result-ttl",
                 "90m", "--max-attempts", "7", "--fail-fast", "--metadata", "k=v=w", "--model", "m",
                 "--owner", "me"}),
            kExitOk)
      << err_.str();
  EXPECT_EQ(server_.uploads.size(), 1);
  const auto& [request_id, upload] = *server_.uploads.begin();
  EXPECT_THAT(request_id, AllOf(StartsWith("latentd-batch-"), SizeIs(46)));
  EXPECT_EQ(out_.str(), upload.job + "\n");
  EXPECT_EQ(err_.str(), "");
  ASSERT_THAT(upload.items, SizeIs(2));
  EXPECT_EQ(upload.items[0].chat().messages(0).content(), "One");
  EXPECT_EQ(upload.items[1].complete().text(), "Two");
  EXPECT_EQ(upload.spec.model(), "m");
  EXPECT_EQ(upload.spec.priority(), -3);
  EXPECT_EQ(upload.spec.completion_window().seconds(), 2 * 86400);
  EXPECT_EQ(upload.spec.result_ttl().seconds(), 90 * 60);
  EXPECT_EQ(upload.spec.max_attempts_per_item(), 7);
  EXPECT_TRUE(upload.spec.fail_fast());
  EXPECT_EQ(upload.spec.metadata().at("k"), "v=w");
  EXPECT_THAT(server_.owners, ElementsAre("me"));
}

TEST_F(BatchTest, TheSameCommandIsTheSameJobAndAnotherIsNot) {
  const std::string file = Write("in.jsonl", ItemLines(3));
  EXPECT_EQ(Run({"submit", file}), kExitOk);
  const std::string job = out_.str();
  EXPECT_EQ(Run({"submit", file}), kExitOk);
  EXPECT_EQ(out_.str(), job);
  EXPECT_THAT(err_.str(), HasSubstr("is there already: queued"));
  EXPECT_EQ(Run({"submit", file, "--priority", "1"}), kExitOk);
  EXPECT_NE(out_.str(), job);
  EXPECT_EQ(Run({"submit", Write("other.jsonl", ItemLines(4))}), kExitOk);
  EXPECT_NE(out_.str(), job);
  EXPECT_EQ(Run({"submit", file, "--request-id", "mine"}), kExitOk);
  EXPECT_TRUE(server_.uploads.contains("mine"));
  EXPECT_EQ(server_.uploads.size(), 4);
}

TEST_F(BatchTest, StandardInputIsAFileToo) {
  const std::string lines = ItemLines(20);
  ASSERT_EQ(write(in_[1], lines.data(), lines.size()), static_cast<ssize_t>(lines.size()));
  close(std::exchange(in_[1], -1));
  EXPECT_EQ(Run({"submit", "-"}), kExitOk) << err_.str();
  EXPECT_THAT(server_.uploads.begin()->second.items, SizeIs(20));
}

TEST_F(BatchTest, ABrokenUploadGoesOnWhereItStopped) {
  server_.break_after_items = 700;
  EXPECT_EQ(Run({"submit", Write("in.jsonl", ItemLines(2500))}), kExitOk) << err_.str();
  EXPECT_THAT(server_.first_items, ElementsAre(0, 700, 1400, 2100));
  EXPECT_THAT(server_.uploads.begin()->second.items, SizeIs(2500));
  EXPECT_EQ(server_.uploads.begin()->second.items[1234].custom_id(), "item-1234");
}

TEST_F(BatchTest, AnUploadOutlivesTheServersEnd) {
  server_.break_after_items = 400;
  std::thread restart([this] {
    while ((server_.lock(), server_.first_items.size()) < 2) std::this_thread::yield();
    server_.Stop();
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    server_.Start();
  });
  const int exit_code = Run({"submit", Write("in.jsonl", ItemLines(2000))});
  restart.join();
  EXPECT_EQ(exit_code, kExitOk) << err_.str();
  EXPECT_THAT(server_.uploads.begin()->second.items, SizeIs(2000));
}

TEST_F(BatchTest, OtherItemsUnderTheSameKeyAreRefused) {
  EXPECT_EQ(Run({"submit", Write("a.jsonl", ItemLines(3)), "--request-id", "key"}), kExitOk);
  EXPECT_EQ(Run({"submit", Write("b.jsonl", ItemLines(2)), "--request-id", "key"}), kExitFailed);
  EXPECT_THAT(err_.str(), HasSubstr("other items under the request id key"));
  EXPECT_EQ(Run({"submit", Write("c.jsonl", ItemLine("x") + ItemLines(2)), "--request-id", "key"}),
            kExitFailed);
  EXPECT_THAT(err_.str(), HasSubstr("ALREADY_EXISTS"));
}

TEST_F(BatchTest, EveryBadLineIsToldBeforeAnythingIsSent) {
  const std::string file = Write(
      "in.jsonl", ItemLine("a") + "{\"custom_id\": \n" + ItemLine("b") + "\n" + ItemLine("a") +
                      R"({"custom_id": "c", "chat": {"messages": [], "temper": 1}})" + "\n" +
                      R"({"custom_id": "d", "method": "POST", "url": "/v1/completions",)" +
                      R"( "body": {"prompt": "x", "stream": true, "temperature": "x"}})");
  EXPECT_EQ(Run({"submit", file}), kExitUsage);
  std::vector<std::string> lines;
  std::istringstream text(err_.str());
  for (std::string line; std::getline(text, line);) lines.push_back(line);
  EXPECT_THAT(
      lines,
      ElementsAre(StartsWith(file + ":2: is no JSON (byte 15): "),
                  file + ":5: custom_id: 'a' is that of line 1 too",
                  StartsWith(file + ":6: is no BatchItem: "),
                  file + ":7: body.temperature: is a string; must be a number",
                  file + ":7: body.stream: is true; an item of a batch job is answered as a whole",
                  "error: " + file + " is not sent"));
  EXPECT_THAT(server_.uploads, IsEmpty());
  EXPECT_EQ(out_.str(), "");
}

TEST_F(BatchTest, BadLinesAreToldUpToALimit) {
  std::string lines;
  for (int i = 0; i < 50; ++i) lines += "{}\n";  // four things are wrong with each
  const std::string file = Write("in.jsonl", lines);
  EXPECT_EQ(Run({"submit", file, "--max-errors", "10"}), kExitUsage);
  const std::string told = err_.str();
  EXPECT_EQ(std::count(told.begin(), told.end(), '\n'), 12);
  EXPECT_THAT(told, HasSubstr(file + ":3: more is wrong; the rest was not read\n"));
}

TEST_F(BatchTest, ImportTakesOpenAisFormatAlone) {
  const std::string file = Write("in.jsonl", R"({"custom_id": "b", "complete": {"text": "Two"}})");
  EXPECT_EQ(Run({"import", file}), kExitUsage);
  EXPECT_THAT(err_.str(), HasSubstr(":1: method: must be POST"));
  EXPECT_EQ(Run({"submit", file}), kExitOk);
}

TEST_F(BatchTest, WhatTheServerRefusesIsToldByLines) {
  google::rpc::BadRequest bad;
  for (const char* field : {"items[2].chat.limits.max_tokens", "items[0].custom_id"}) {
    auto* violation = bad.add_field_violations();
    violation->set_field(field);
    violation->set_description("is odd");
  }
  server_.commit_status =
      StatusWithDetails(grpc::StatusCode::INVALID_ARGUMENT, "bad request", {&bad});
  const std::string file =
      Write("in.jsonl", "\n" + ItemLine("a") + "\n\n" + ItemLine("b") + ItemLine("c"));
  EXPECT_EQ(Run({"submit", file}), kExitUsage);
  EXPECT_EQ(err_.str(), file + ":2: custom_id: is odd\n" + file +
                            ":6: chat.limits.max_tokens: is odd\nerror: " + file +
                            " was refused; nothing of it is kept\n");
}

TEST_F(BatchTest, OtherErrorsOfTheServerAreFailures) {
  server_.commit_status = {grpc::StatusCode::RESOURCE_EXHAUSTED, "too many jobs"};
  EXPECT_EQ(Run({"submit", Write("in.jsonl", ItemLines(1))}), kExitFailed);
  EXPECT_THAT(err_.str(), HasSubstr("RESOURCE_EXHAUSTED: too many jobs"));
}

TEST_F(BatchTest, BadOptionsAndFilesAreRefused) {
  const std::string file = Write("in.jsonl", ItemLines(1));
  EXPECT_EQ(Run({"submit", Path("none.jsonl")}), kExitUsage);
  EXPECT_THAT(err_.str(), HasSubstr("cannot open"));
  EXPECT_EQ(Run({"submit", Write("empty.jsonl", "\n\n")}), kExitUsage);
  EXPECT_THAT(err_.str(), HasSubstr("has no items"));
  EXPECT_EQ(Run({"submit", file, "--completion-window", "soon"}), kExitUsage);
  EXPECT_EQ(err_.str(),
            "error: --completion-window is 'soon'; it must be a time such as 90s, 12h or 7d\n");
  EXPECT_EQ(Run({"submit", file, "--metadata", "=x"}), kExitUsage);
  EXPECT_EQ(Run({"submit", folder_}), kExitFailed);
  EXPECT_THAT(server_.uploads, IsEmpty());
}

// ---- watch ------------------------------------------------------------------------------------

TEST_F(BatchTest, ExitCodesAreOfTheJobsEnd) {
  SetJob(v1::JOB_STATE_COMPLETED, 3, 3);
  EXPECT_EQ(Run({"watch", kJob}), kExitOk);
  EXPECT_EQ(err_.str(), "completed [##############################] 100 %  3/3 items\n" +
                            std::string(kJob) + ": completed: 3 of 3 items succeeded\n");
  SetJob(v1::JOB_STATE_COMPLETED, 3, 2, 1);
  EXPECT_EQ(Run({"watch", kJob}), kExitItemsFailed);
  EXPECT_THAT(err_.str(), EndsWith(": completed: 2 of 3 items succeeded, 1 failed\n"));
  SetJob(v1::JOB_STATE_EXPIRED, 3, 2);
  EXPECT_EQ(Run({"watch", "0123456789abcdef0123456789abcdef"}), kExitJobExpired);
  SetJob(v1::JOB_STATE_CANCELLED, 3, 2);
  EXPECT_EQ(Run({"watch", kJob}), kExitJobCancelled);
  SetJob(v1::JOB_STATE_FAILED, 3, 2, 1);
  EXPECT_EQ(Run({"watch", kJob}), kExitJobFailed);
  EXPECT_EQ(Run({"watch", "jobs/none"}), kExitFailed);
  EXPECT_EQ(err_.str(), "error: NOT_FOUND: there is no such job\n");
}

TEST_F(BatchTest, WatchGoesOnWhenTheStreamBreaks) {
  SetJob(v1::JOB_STATE_QUEUED, 4, 0);
  server_.watched = {{MakeJob(kJob, v1::JOB_STATE_IN_PROGRESS, 4, 1, 2)},
                     {},
                     {MakeJob(kJob, v1::JOB_STATE_IN_PROGRESS, 4, 2, 3),
                      MakeJob(kJob, v1::JOB_STATE_COMPLETED, 4, 4, 4)}};
  EXPECT_EQ(Run({"watch", kJob, "--json"}), kExitOk);
  std::vector<int64_t> revisions;
  std::istringstream lines(out_.str());
  for (std::string line; std::getline(lines, line);) {
    v1::Job job;
    ASSERT_TRUE(google::protobuf::util::JsonStringToMessage(line, &job).ok()) << line;
    revisions.push_back(job.revision());
  }
  EXPECT_EQ(revisions.back(), 4);
  EXPECT_THAT(revisions, testing::IsSupersetOf({1, 2, 3, 4}));
}

TEST_F(BatchTest, SubmitAndWatch) {
  std::thread end([this] {
    while ((server_.lock(), server_.jobs.empty())) std::this_thread::yield();
    const auto held = server_.lock();
    v1::Job& job = server_.jobs.begin()->second;
    job = MakeJob(job.name(), v1::JOB_STATE_COMPLETED, 1, 0, 9);
    job.mutable_counts()->set_failed(1);
  });
  EXPECT_EQ(Run({"submit", Write("in.jsonl", ItemLines(1)), "--watch"}), kExitItemsFailed);
  end.join();
  EXPECT_THAT(out_.str(), StartsWith("jobs/"));
}

TEST_F(BatchTest, TheTerminalsLineIsRewritten) {
  is_terminal_ = true;
  SetJob(v1::JOB_STATE_COMPLETED, 3, 2, 1);
  EXPECT_EQ(Run({"watch", kJob}), kExitItemsFailed);
  EXPECT_THAT(err_.str(), StartsWith("\r\x1b[Kcompleted [####"));
  EXPECT_THAT(err_.str(), HasSubstr(", 1 failed\njobs/"));
}

TEST_F(BatchTest, CtrlCEndsTheWatchingAlone) {
  SetJob(v1::JOB_STATE_QUEUED, 3, 0);
  std::thread user([] {
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    kill(getpid(), SIGINT);
  });
  EXPECT_EQ(Run({"watch", kJob}), kExitInterrupted);
  user.join();
  EXPECT_THAT(err_.str(), HasSubstr("goes on; `latentd batch watch jobs/"));
}

// ---- results ----------------------------------------------------------------------------------

TEST_F(BatchTest, ResultsComeOnceWhateverBreaks) {
  SetJob(v1::JOB_STATE_COMPLETED, 9, 6, 3);
  AddResults(9);
  server_.break_after_results = 4;
  EXPECT_EQ(Run({"results", kJob}), kExitOk);
  std::istringstream lines(out_.str());
  int64_t index = 0;
  for (std::string line; std::getline(lines, line); ++index) {
    v1::ItemResult result;
    ASSERT_TRUE(google::protobuf::util::JsonStringToMessage(line, &result).ok()) << line;
    EXPECT_EQ(result.index(), index);
  }
  EXPECT_EQ(index, 9);
  EXPECT_EQ(Run({"results", kJob, "--state", "lost"}), kExitUsage);
}

TEST_F(BatchTest, ACursorFileGoesOn) {
  SetJob(v1::JOB_STATE_IN_PROGRESS, 9, 3, 0);
  AddResults(3);
  const std::string cursor = Path("cursor");
  EXPECT_EQ(Run({"results", kJob, "--cursor-file", cursor, "--openai"}), kExitOk) << err_.str();
  EXPECT_THAT(out_.str(), HasSubstr("\"status_code\":400"));
  EXPECT_EQ(Run({"results", kJob, "--cursor-file", cursor}), kExitOk);
  EXPECT_EQ(out_.str(), "");
  AddResults(1);
  EXPECT_EQ(Run({"results", kJob, "--cursor-file", cursor}), kExitOk);
  EXPECT_THAT(out_.str(), HasSubstr("\"custom_id\":\"item-0\""));
  EXPECT_EQ(Run({"results", "jobs/other", "--cursor-file", cursor}), kExitUsage);
  EXPECT_THAT(err_.str(), HasSubstr("is a cursor of jobs/0123"));
  EXPECT_EQ(Run({"results", kJob, "--cursor-file", Write("text", "hello")}), kExitUsage);
}

TEST_F(BatchTest, ExportWritesOutputAndErrors) {
  SetJob(v1::JOB_STATE_COMPLETED, 6, 4, 2);
  AddResults(6);
  server_.break_after_results = 2;
  EXPECT_EQ(Run({"export", kJob, Path("out.jsonl")}), kExitItemsFailed) << err_.str();
  const std::string output = Contents(Path("out.output.jsonl"));
  const std::string errors = Contents(Path("out.errors.jsonl"));
  EXPECT_EQ(std::count(output.begin(), output.end(), '\n'), 4);
  EXPECT_EQ(std::count(errors.begin(), errors.end(), '\n'), 2);
  EXPECT_THAT(errors, HasSubstr("\"custom_id\":\"item-2\""));
  EXPECT_FALSE(std::filesystem::exists(Path("out.cursor")));
  // What is there is not written over by chance.
  EXPECT_EQ(Run({"export", kJob, Path("out")}), kExitUsage);
  EXPECT_THAT(err_.str(), HasSubstr("--overwrite"));
  EXPECT_EQ(Run({"export", kJob, Path("out"), "--overwrite"}), kExitItemsFailed);
  EXPECT_EQ(Contents(Path("out.output.jsonl")), output);
}

TEST_F(BatchTest, ExportGoesOnAfterItsOwnDeath) {
  SetJob(v1::JOB_STATE_IN_PROGRESS, 9, 3, 0);
  AddResults(4);
  EXPECT_EQ(Run({"export", kJob, Path("out")}), kExitOk) << err_.str();
  EXPECT_THAT(err_.str(), HasSubstr("is in_progress: the same command goes on"));
  // As a kill between the lines and their cursor leaves it.
  std::ofstream(Path("out.output.jsonl"), std::ios::app) << "{\"id\": \"half";
  std::ofstream(Path("out.errors.jsonl"), std::ios::app) << "{}\n";
  server_.results.clear();
  AddResults(9);
  SetJob(v1::JOB_STATE_COMPLETED, 9, 6, 3);
  EXPECT_EQ(Run({"export", kJob, Path("out")}), kExitItemsFailed) << err_.str();
  EXPECT_EQ(Run({"export", kJob, Path("whole")}), kExitItemsFailed);
  EXPECT_EQ(Contents(Path("out.output.jsonl")), Contents(Path("whole.output.jsonl")));
  EXPECT_EQ(Contents(Path("out.errors.jsonl")), Contents(Path("whole.errors.jsonl")));
}

TEST_F(BatchTest, AnExportThatWasCutIsNotGoneOnWith) {
  SetJob(v1::JOB_STATE_IN_PROGRESS, 9, 3, 0);
  AddResults(4);
  EXPECT_EQ(Run({"export", kJob, Path("out")}), kExitOk);
  std::filesystem::resize_file(Path("out.output.jsonl"), 3);
  EXPECT_EQ(Run({"export", kJob, Path("out")}), kExitUsage);
  EXPECT_THAT(err_.str(), HasSubstr("was changed since"));
}

// ---- the rest ---------------------------------------------------------------------------------

TEST_F(BatchTest, StatusAndList) {
  SetJob(v1::JOB_STATE_IN_PROGRESS, 9, 3, 1);
  EXPECT_EQ(Run({"status", kJob}), kExitOk);
  EXPECT_THAT(out_.str(), AllOf(StartsWith(std::string(kJob) + "\n  state        in_progress\n"),
                                HasSubstr("9: 3 succeeded, 1 failed")));
  EXPECT_EQ(Run({"status", kJob, "--json"}), kExitOk);
  EXPECT_THAT(out_.str(), StartsWith("{\"name\":\"jobs/0123456789abcdef"));
  EXPECT_EQ(Run({"status", "jobs/none"}), kExitFailed);
  for (int i = 0; i < 5; ++i) {
    const std::string name = "jobs/" + std::to_string(i);
    server_.jobs[name] = MakeJob(name, v1::JOB_STATE_COMPLETED, 1, 1);
  }
  EXPECT_EQ(Run({"list", "--limit", "4", "--state", "completed", "--metadata", "a=b"}), kExitOk);
  const std::string table = out_.str();
  EXPECT_EQ(std::count(table.begin(), table.end(), '\n'), 5);
  EXPECT_THAT(server_.lists.back().states(), ElementsAre(v1::JOB_STATE_COMPLETED));
  EXPECT_EQ(server_.lists.back().metadata().at("a"), "b");
  EXPECT_EQ(Run({"list", "--state", "done"}), kExitUsage);
}

TEST_F(BatchTest, CancelDeleteRetry) {
  SetJob(v1::JOB_STATE_IN_PROGRESS, 9, 3);
  EXPECT_EQ(Run({"cancel", kJob}), kExitOk);
  EXPECT_EQ(err_.str(), std::string(kJob) + ": cancelling\n");
  EXPECT_EQ(Run({"retry", kJob}), kExitOk);
  const std::string retried = out_.str();
  EXPECT_THAT(retried, StartsWith("jobs/"));
  EXPECT_EQ(Run({"retry", kJob}), kExitOk);
  EXPECT_EQ(out_.str(), retried);
  EXPECT_THAT(err_.str(), HasSubstr("is there already"));
  EXPECT_EQ(Run({"retry", kJob, "--request-id", "again"}), kExitOk);
  EXPECT_NE(out_.str(), retried);
  EXPECT_EQ(server_.retries.back().request_id(), "again");
  EXPECT_EQ(Run({"delete", kJob, "--etag", "e"}), kExitOk);
  EXPECT_EQ(server_.deletes.back().etag(), "e");
  EXPECT_EQ(Run({"delete", kJob}), kExitFailed);
}

TEST_F(BatchTest, ServerThatIsNotThereIsAnErrorAtOnce) {
  const std::string target = server_.target();
  server_.Stop();
  CLI::App app;
  int exit_code = -1;
  RegisterBatchCommand(app, {.in_fd = in_[0], .err_is_terminal = false, .out = out_, .err = err_},
                       &exit_code);
  app.parse("batch list --target " + target);
  EXPECT_EQ(exit_code, kExitFailed);
  EXPECT_THAT(err_.str(), StartsWith("error: UNAVAILABLE: "));
}

}  // namespace
}  // namespace latentd
