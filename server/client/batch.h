#ifndef LATENTD_SERVER_CLIENT_BATCH_H_
#define LATENTD_SERVER_CLIENT_BATCH_H_

#include "server/client/batch_client.h"

namespace CLI {
class App;
}

namespace latentd {

// Adds `latentd batch submit|status|list|watch|results|cancel|delete|retry|import|export` to the
// program. Their callbacks run the command and set `*exit_code`, which must outlive `app`'s
// parsing, to one of the kExit* of connection.h and batch_watch.h.
void RegisterBatchCommand(CLI::App& app, const BatchTerminal& terminal, int* exit_code);

}  // namespace latentd

#endif  // LATENTD_SERVER_CLIENT_BATCH_H_
