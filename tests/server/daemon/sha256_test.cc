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
  const std::string one = ChainItem("", "first");
  EXPECT_EQ(one, Sha256::Of(Sha256::Of("first")));
  EXPECT_EQ(ChainItem(one, "second"), Sha256::Of(one + Sha256::Of("second")));
  EXPECT_NE(ChainItem(one, "second"), ChainItem(ChainItem("", "second"), "first"));
}

}  // namespace
}  // namespace latentd
