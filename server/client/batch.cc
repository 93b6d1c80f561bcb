#include "server/client/batch.h"

#include <functional>
#include <memory>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "engine/status.h"
#include "server/client/batch_jobs.h"
#include "server/client/batch_results.h"
#include "server/client/batch_submit.h"
#include "server/client/batch_watch.h"

namespace latentd {
namespace {

constexpr char kFooter[] =
    "Exit codes: 0 done, or every item succeeded; 1 the server or the network; 2 an option or a "
    "line of the file is wrong; of commands that wait for the job: 3 it is completed and items "
    "failed, 4 it expired, 5 it was cancelled, 6 it failed; 130 Ctrl-C.";

// What all commands are made with.
struct Commands {
  CLI::App& batch;
  const BatchTerminal terminal;
  int* const exit_code;

  // Adds a command that talks to a server.
  CLI::App* Add(const std::string& name, const std::string& help,
                std::function<int(BatchClient&)> run) const {
    CLI::App* command = batch.add_subcommand(name, help);
    command->footer(kFooter);
    const auto options = std::make_shared<BatchConnection>();
    AddConnectionOptions(*command, &options->connection);
    command->add_option("--owner", options->owner,
                        "Whose jobs they are (default: the server goes by the address)");
    command->callback([options, run = std::move(run), terminal = terminal, exit_code = exit_code] {
      if (absl::Status valid = ValidateConnectionOptions(options->connection); !valid.ok()) {
        terminal.err << "error: " << valid.message() << std::endl;
        *exit_code = kExitUsage;
        return;
      }
      const Interrupts interrupts;
      BatchClient client(*options, interrupts, terminal.err);
      *exit_code = run(client);
    });
    return command;
  }
};

// The digits alone are a name too.
void AddJobOption(CLI::App* command, std::string* job) {
  command
      ->add_option_function<std::string>(
          "job", [job](const std::string& name) { *job = FullJobName(name); }, "jobs/...")
      ->required();
}

void AddJobsOption(CLI::App* command, std::vector<std::string>* jobs) {
  command
      ->add_option_function<std::vector<std::string>>(
          "jobs",
          [jobs](const std::vector<std::string>& names) {
            for (const std::string& name : names) jobs->push_back(FullJobName(name));
          },
          "jobs/...")
      ->required();
}

void AddSubmit(const Commands& commands, const std::string& name, const std::string& help,
               bool openai_only) {
  const auto options = std::make_shared<SubmitOptions>();
  options->openai_only = openai_only;
  CLI::App* command =
      commands.Add(name, help, [options, terminal = commands.terminal](BatchClient& client) {
        return SubmitJob(client, *options, terminal);
      });
  command->add_option("file", options->file, "JSON lines; \"-\": standard input")->required();
  command->add_option("--max-errors", options->max_errors, "So many wrong lines are told")
      ->check(CLI::Range(1, 1'000'000))
      ->capture_default_str();
  command->add_option("--request-id", options->request_id,
                      "The job's key: the same one is the same job (default: made of the job, so "
                      "that the same command goes on with it)");
  command->add_option("--model", options->model, "Model (default: the one that is served)");
  command->add_option("--completion-window", options->completion_window,
                      "Then items that have not ended expire, such as 30m, 12h, 7d (default 24h)");
  command->add_option("--result-ttl", options->result_ttl,
                      "So long after its end the job is kept (default: the server's)");
  command->add_option("--priority", options->priority, "Among jobs, -1000 to 1000; higher first")
      ->capture_default_str();
  command->add_option("--max-attempts", options->max_attempts,
                      "So often an item is begun when the server dies over it (default 5)");
  command->add_flag("--fail-fast", options->fail_fast, "End the job when an item has failed");
  command->add_option("--metadata", options->metadata, "KEY=VALUE of your own; may be given again")
      ->allow_extra_args(false);
  command->add_flag("--watch", options->watch, "Follow the job to its end, as `watch` does");
  command->add_flag("--json", options->json, "The job as JSON rather than its name");
}

void AddWatch(const Commands& commands) {
  struct Options {
    std::string job;
    bool json = false;
  };
  const auto options = std::make_shared<Options>();
  CLI::App* command = commands.Add("watch", "Follow a job to its end",
                                   [options, terminal = commands.terminal](BatchClient& client) {
                                     return WatchJob(client, options->job, options->json, terminal);
                                   });
  AddJobOption(command, &options->job);
  command->add_flag("--json", options->json, "Every change of the job as a line of JSON");
}

void AddResults(const Commands& commands) {
  const auto options = std::make_shared<ResultsOptions>();
  CLI::App* command = commands.Add("results", "Print a job's results as they were finished",
                                   [options, terminal = commands.terminal](BatchClient& client) {
                                     return PrintResults(client, *options, terminal);
                                   });
  AddJobOption(command, &options->job);
  command->add_flag("--follow", options->follow, "Go on with results as they come, to the end");
  command->add_option("--cursor-file", options->cursor_file,
                      "Keeps how far this got: the next run goes on there");
  command
      ->add_option("--state", options->states,
                   "succeeded, failed, cancelled or expired; may be given again (default: all)")
      ->allow_extra_args(false);
  command->add_flag("--openai", options->openai,
                    "Lines of OpenAI's batch files, rather than ItemResult as JSON");
}

void AddExport(const Commands& commands) {
  const auto options = std::make_shared<ExportOptions>();
  CLI::App* command =
      commands.Add("export", "Write a job's results as OpenAI's output and error file",
                   [options, terminal = commands.terminal](BatchClient& client) {
                     return ExportResults(client, *options, terminal);
                   });
  AddJobOption(command, &options->job);
  command
      ->add_option("file", options->prefix,
                   "FILE or FILE.jsonl: writes FILE.output.jsonl and FILE.errors.jsonl. Until all "
                   "is written FILE.cursor says how far it got, and the same command goes on")
      ->required();
  command->add_flag("--follow", options->follow, "Go on with results as they come, to the end");
  command->add_flag("--overwrite", options->overwrite, "Write files anew that are there already");
}

void AddStatusAndList(const Commands& commands) {
  const auto status = std::make_shared<JobsOptions>();
  CLI::App* command = commands.Add("status", "Show jobs as they are now",
                                   [status, terminal = commands.terminal](BatchClient& client) {
                                     return ShowJobs(client, *status, terminal);
                                   });
  AddJobsOption(command, &status->jobs);
  command->add_flag("--json", status->json, "A line of JSON for each");

  const auto list = std::make_shared<ListOptions>();
  command = commands.Add("list", "List jobs, newest first",
                         [list, terminal = commands.terminal](BatchClient& client) {
                           return ListJobs(client, *list, terminal);
                         });
  command
      ->add_option("--state", list->states,
                   "queued, in_progress, completed, ...; may be given again (default: all)")
      ->allow_extra_args(false);
  command->add_option("--metadata", list->metadata, "KEY=VALUE that they have; may be given again")
      ->allow_extra_args(false);
  command->add_option("--limit", list->limit, "So many at most")
      ->check(CLI::Range(1, 1'000'000))
      ->capture_default_str();
  command->add_flag("--json", list->json, "A line of JSON for each");
}

void AddCancelDeleteRetry(const Commands& commands) {
  const auto cancel = std::make_shared<JobsOptions>();
  CLI::App* command = commands.Add("cancel", "Run no more items of jobs; what is finished stays",
                                   [cancel, terminal = commands.terminal](BatchClient& client) {
                                     return CancelJobs(client, *cancel, terminal);
                                   });
  AddJobsOption(command, &cancel->jobs);

  const auto deleted = std::make_shared<JobsOptions>();
  command = commands.Add("delete", "Remove jobs that have ended, with their results",
                         [deleted, terminal = commands.terminal](BatchClient& client) {
                           return DeleteJobs(client, *deleted, terminal);
                         });
  AddJobsOption(command, &deleted->jobs);
  command->add_option("--etag", deleted->etag, "Only when the job's etag is this one");

  const auto retry = std::make_shared<RetryOptions>();
  command = commands.Add("retry", "Make a new job of the items without success of an ended one",
                         [retry, terminal = commands.terminal](BatchClient& client) {
                           return RetryJob(client, *retry, terminal);
                         });
  AddJobOption(command, &retry->job);
  command->add_option("--request-id", retry->request_id,
                      "The new job's key (default: made of the job's name, so that the same "
                      "command gives the same new job)");
  command->add_flag("--watch", retry->watch, "Follow the new job to its end, as `watch` does");
  command->add_flag("--json", retry->json, "The new job as JSON rather than its name");
}

}  // namespace

void RegisterBatchCommand(CLI::App& app, const BatchTerminal& terminal, int* exit_code) {
  CLI::App* batch =
      app.add_subcommand("batch", "Durable jobs of many requests on a running server");
  batch->require_subcommand(1);
  batch->footer(kFooter);
  const Commands commands{.batch = *batch, .terminal = terminal, .exit_code = exit_code};
  AddSubmit(commands, "submit",
            "Make a job of a file: OpenAI's batch format, or BatchItem as JSON, a line each",
            /*openai_only=*/false);
  AddSubmit(commands, "import", "Make a job of a file in OpenAI's batch format",
            /*openai_only=*/true);
  AddStatusAndList(commands);
  AddWatch(commands);
  AddResults(commands);
  AddExport(commands);
  AddCancelDeleteRetry(commands);
}

}  // namespace latentd
