#ifndef LATENTD_SERVER_CLIENT_BATCH_JOBS_H_
#define LATENTD_SERVER_CLIENT_BATCH_JOBS_H_

#include <string>
#include <vector>

#include "server/client/batch_client.h"

// The batch commands that are one call, or one for each job. All return the exit code.

namespace latentd {

// With "jobs/" before it, where only the digits were given.
std::string FullJobName(const std::string& name);

struct JobsOptions {
  std::vector<std::string> jobs;
  std::string etag;  // DeleteJobs: only when it is this one
  bool json = false;
};
int ShowJobs(BatchClient& client, const JobsOptions& options, const BatchTerminal& terminal);
int CancelJobs(BatchClient& client, const JobsOptions& options, const BatchTerminal& terminal);
int DeleteJobs(BatchClient& client, const JobsOptions& options, const BatchTerminal& terminal);

struct ListOptions {
  std::vector<std::string> states;    // names; empty: all
  std::vector<std::string> metadata;  // KEY=VALUE
  int limit = 100;
  bool json = false;
};
int ListJobs(BatchClient& client, const ListOptions& options, const BatchTerminal& terminal);

struct RetryOptions {
  std::string job;
  std::string request_id;  // empty: made of the job's name
  bool watch = false;
  bool json = false;
};
int RetryJob(BatchClient& client, const RetryOptions& options, const BatchTerminal& terminal);

}  // namespace latentd

#endif  // LATENTD_SERVER_CLIENT_BATCH_JOBS_H_
