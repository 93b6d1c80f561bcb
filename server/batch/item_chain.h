#ifndef LATENTD_SERVER_BATCH_ITEM_CHAIN_H_
#define LATENTD_SERVER_BATCH_ITEM_CHAIN_H_

#include <string>
#include <string_view>

#include "server/sha256.h"

namespace latentd {

// The hash chain over the items of an upload, as CreateJobRequest.Commit.sha256 says: two sides
// that have the same value have the same items. Not for several threads at once.
class ItemChain {
 public:
  // `value`: what there is; empty: no items yet.
  explicit ItemChain(std::string_view value = "") : value_(value) {}

  // One more: `item` is a serialized BatchItem, as it is sent.
  void Add(std::string_view item) {
    const std::string digest = Sha256::Of(item);
    chain_.Add(value_);
    chain_.Add(digest);
    value_ = chain_.Finish();
  }
  const std::string& value() const { return value_; }

 private:
  Sha256 chain_;
  std::string value_;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_BATCH_ITEM_CHAIN_H_
