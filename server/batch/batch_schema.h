#ifndef LATENTD_SERVER_BATCH_BATCH_SCHEMA_H_
#define LATENTD_SERVER_BATCH_BATCH_SCHEMA_H_

#include <cstdint>

#include "absl/status/status.h"
#include "server/batch/sqlite.h"

namespace latentd {

// What this version writes. A store says in its user_version which one it has.
int32_t BatchSchemaVersion();

// FAILED_PRECONDITION, and nothing is changed, when the database is none of ours or of a newer
// version.
absl::Status CheckBatchSchema(SqliteConnection* db);

// Brings a new or older store to this version, or (for tests) to `version`; each step is a
// transaction of its own, so that a crash leaves one version or the next.
absl::Status MigrateBatchSchema(SqliteConnection* db, int32_t version = BatchSchemaVersion());

}  // namespace latentd

#endif  // LATENTD_SERVER_BATCH_BATCH_SCHEMA_H_
