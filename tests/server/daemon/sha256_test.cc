#include "server/sha256.h"

#include <gtest/gtest.h>

#include "server/batch/item_chain.h"

namespace latentd {
namespace {

// FIPS 180-4's own examples.
constexpr char kOfNothing[] = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
constexpr char kOfAbc[] = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

TEST(Sha256Test, KnownDigests) {
  EXPECT_EQ(HexOf(Sha256::Of("")), kOfNothing);
  EXPECT_EQ(HexOf(Sha256::Of("abc")), kOfAbc);
}

TEST(Sha256Test, PiecesAreTheWholeAndAnObjectBeginsAnew) {
  Sha256 sha256;
  for (int i = 0; i < 3; ++i) {
    sha256.Add("a");
    sha256.Add("");
    sha256.Add("bc");
    EXPECT_EQ(HexOf(sha256.Finish()), kOfAbc);
    EXPECT_EQ(HexOf(sha256.Finish()), kOfNothing);
  }
}

TEST(Sha256Test, ChainIsOfTheDigestsInTheirOrder) {
  ItemChain chain;
  EXPECT_EQ(chain.value(), "");
  chain.Add("first");
  EXPECT_EQ(chain.value(), Sha256::Of(Sha256::Of("first")));
  ItemChain resumed(chain.value());
  chain.Add("second");
  resumed.Add("second");
  EXPECT_EQ(chain.value(), Sha256::Of(Sha256::Of(Sha256::Of("first")) + Sha256::Of("second")));
  EXPECT_EQ(resumed.value(), chain.value());
}

}  // namespace
}  // namespace latentd
