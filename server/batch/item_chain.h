#ifndef LATENTD_SERVER_BATCH_ITEM_CHAIN_H_
#define LATENTD_SERVER_BATCH_ITEM_CHAIN_H_

#include <string>
#include <string_view>

#include "server/sha256.h"

namespace latentd {

// One more item in the chain that CreateJobRequest.Commit.sha256 and GetUploadResponse.sha256
// speak of. The chain begins empty; `item` is the serialized BatchItem as it is sent.
inline std::string ChainItem(std::string_view chain, std::string_view item) {
  std::string both(chain);
  both += Sha256::Of(item);
  return Sha256::Of(both);
}

}  // namespace latentd

#endif  // LATENTD_SERVER_BATCH_ITEM_CHAIN_H_
