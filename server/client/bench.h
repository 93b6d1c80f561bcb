#ifndef LATENTD_SERVER_CLIENT_BENCH_H_
#define LATENTD_SERVER_CLIENT_BENCH_H_

#include <iosfwd>

#include "server/client/bench_options.h"

namespace CLI {
class App;
}

namespace latentd {

// Adds `latentd bench serve` to the program. Its callback runs the command and sets `*exit_code`,
// which must outlive `app`'s parsing, to one of the kExit* of connection.h.
void RegisterBenchCommand(CLI::App& app, int* exit_code);

// Runs the benchmark to its end; Ctrl-C ends it early, with the report so far. The JSON report goes
// to `out` or options.output, progress, table and errors to `err`. Returns the exit code:
// kExitFailed when the server is not there, or the share of failed requests is above
// max_error_rate.
int RunBench(BenchOptions options, bool err_is_terminal, std::ostream& out, std::ostream& err);

}  // namespace latentd

#endif  // LATENTD_SERVER_CLIENT_BENCH_H_
