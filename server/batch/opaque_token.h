#ifndef LATENTD_SERVER_BATCH_OPAQUE_TOKEN_H_
#define LATENTD_SERVER_BATCH_OPAQUE_TOKEN_H_

#include <cstdint>
#include <optional>
#include <string>

namespace latentd {

// Positions as clients hold them: cursors of results, tokens of pages. A token is good for its
// scope alone, on any server and after any restart.

// `position` in what `scope` names, such as "results of jobs/4f..".
std::string OpaqueToken(const std::string& scope, int64_t position);
// The position; nullopt: the token is not of this scope.
std::optional<int64_t> ReadOpaqueToken(const std::string& scope, const std::string& token);

}  // namespace latentd

#endif  // LATENTD_SERVER_BATCH_OPAQUE_TOKEN_H_
