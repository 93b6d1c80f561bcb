#include "scheduler/block_pool.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"

namespace latentd {
namespace {

using ::testing::ElementsAre;

constexpr int32_t kTestBlock = 2;

std::string Hex(const BlockHash& hash) {
  return absl::BytesToHexString(
      {reinterpret_cast<const char*>(hash.bytes.data()), hash.bytes.size()});
}

// The hash is made of one letter, so that tests say themselves what collides.
BlockHash Hash(char letter) {
  BlockHash hash;
  hash.bytes[0] = static_cast<uint8_t>(letter);
  return hash;
}

class BlockPoolTest : public ::testing::Test {
 protected:
  static BlockContent Content(char hash, const std::vector<TokenId>& tokens,
                              ContentId previous = kNoContent, std::string_view salt = "") {
    return {.hash = Hash(hash), .previous = previous, .salt = salt, .tokens = tokens};
  }

  BlockId Allocate() {
    const std::optional<BlockId> block = pool_.Allocate();
    EXPECT_TRUE(block.has_value());
    pool_.CheckInvariants();
    return *block;
  }

  void Release(const std::vector<BlockId>& blocks) {
    pool_.Release(blocks);
    pool_.CheckInvariants();
  }

  // The block that holds `content`, or -1.
  BlockId Find(const BlockContent& content) {
    const auto found = pool_.Find(content);
    return found ? found->block : -1;
  }

  // Allocates a block, caches `tokens` under `hash`, and gives it back.
  BlockId CacheAndRelease(char hash, const std::vector<TokenId>& tokens) {
    const BlockId block = Allocate();
    pool_.Cache(block, Content(hash, tokens));
    Release({block});
    return block;
  }

  BlockPool pool_{3, kTestBlock};
  const std::vector<TokenId> one_two_{1, 2};
  const std::vector<TokenId> three_four_{3, 4};
  const std::vector<TokenId> five_six_{5, 6};
};

TEST_F(BlockPoolTest, HandsOutEachBlockOnce) {
  EXPECT_EQ(pool_.num_free(), 3);
  EXPECT_THAT((std::vector<BlockId>{Allocate(), Allocate(), Allocate()}), ElementsAre(0, 1, 2));
  EXPECT_EQ(pool_.num_free(), 0);
  EXPECT_FALSE(pool_.Allocate().has_value());
  Release({1});
  EXPECT_EQ(Allocate(), 1);
}

TEST_F(BlockPoolTest, APoolOfNoBlocksHasNone) {
  BlockPool pool(0);
  EXPECT_FALSE(pool.Allocate().has_value());
  pool.CheckInvariants();
}

TEST_F(BlockPoolTest, ACachedBlockIsFoundWhileUsedAndWhenFree) {
  const BlockId block = Allocate();
  EXPECT_EQ(Find(Content('a', one_two_)), -1);
  pool_.Cache(block, Content('a', one_two_));
  EXPECT_EQ(Find(Content('a', one_two_)), block);
  Release({block});
  EXPECT_EQ(Find(Content('a', one_two_)), block);
  EXPECT_EQ(pool_.num_free(), 3);
}

TEST_F(BlockPoolTest, AcquireTakesAFreeBlockOutOfTheListAndSharesAUsedOne) {
  const BlockId block = CacheAndRelease('a', one_two_);
  pool_.Acquire(block);
  EXPECT_EQ(pool_.num_free(), 2);
  pool_.Acquire(block);
  EXPECT_EQ(pool_.num_references(block), 2);
  Release({block});
  EXPECT_EQ(pool_.num_free(), 2);
  Release({block});
  EXPECT_EQ(pool_.num_free(), 3);
}

TEST_F(BlockPoolTest, EmptyBlocksGoFirstThenTheLongestUnused) {
  const BlockId a = CacheAndRelease('a', one_two_);
  pool_.Acquire(a);
  const BlockId b = CacheAndRelease('b', three_four_);
  Release({a});  // now b is the longest unused, then a; the third block holds nothing
  const BlockId empty = Allocate();
  EXPECT_NE(empty, a);
  EXPECT_NE(empty, b);
  EXPECT_EQ(Allocate(), b);
  EXPECT_EQ(Find(Content('b', three_four_)), -1);
  EXPECT_EQ(Find(Content('a', one_two_)), a);
  EXPECT_EQ(Allocate(), a);
  EXPECT_EQ(Find(Content('a', one_two_)), -1);
}

TEST_F(BlockPoolTest, ABlockThatHoldsNothingGoesBeforeOlderOnesThatDo) {
  const BlockId cached = Allocate();
  const BlockId other = Allocate();
  const BlockId empty = Allocate();
  pool_.Cache(cached, Content('a', one_two_));
  pool_.Cache(other, Content('b', three_four_));
  Release({cached});
  Release({other});
  Release({empty});
  EXPECT_EQ(Allocate(), empty);
  EXPECT_EQ(Allocate(), cached);
}

TEST_F(BlockPoolTest, AHitMakesABlockRecent) {
  const BlockId first = Allocate();
  const BlockId second = Allocate();
  const BlockId third = Allocate();
  pool_.Cache(first, Content('a', one_two_));
  pool_.Cache(second, Content('b', three_four_));
  pool_.Cache(third, Content('c', five_six_));
  Release({first});
  Release({second});
  Release({third});
  pool_.Acquire(first);
  Release({first});
  EXPECT_EQ(Allocate(), second);
  EXPECT_EQ(Allocate(), third);
  EXPECT_EQ(Allocate(), first);
}

TEST_F(BlockPoolTest, APrefixOutlivesItsTail) {
  const BlockId head = Allocate();
  const BlockId tail = Allocate();
  const ContentId content = pool_.Cache(head, Content('a', one_two_));
  pool_.Cache(tail, Content('b', three_four_, content));
  Release({head, tail});
  Allocate();
  EXPECT_EQ(Allocate(), tail);
  EXPECT_EQ(Find(Content('a', one_two_)), head);
}

TEST_F(BlockPoolTest, TheFirstOfTwoCopiesStays) {
  const BlockId first = Allocate();
  const BlockId second = Allocate();
  const ContentId content = pool_.Cache(first, Content('a', one_two_));
  EXPECT_EQ(pool_.Cache(second, Content('a', one_two_)), content);
  EXPECT_EQ(Find(Content('a', one_two_)), first);
  pool_.CheckInvariants();
}

TEST_F(BlockPoolTest, ACollisionIsAMissWhateverDiffers) {
  const BlockId block = Allocate();
  pool_.Cache(block, Content('a', one_two_, kNoContent, "salt"));
  EXPECT_EQ(Find(Content('a', one_two_, kNoContent, "salt")), block);
  EXPECT_EQ(Find(Content('a', three_four_, kNoContent, "salt")), -1);
  EXPECT_EQ(Find(Content('a', one_two_, kNoContent, "pepper")), -1);
  EXPECT_EQ(Find(Content('a', one_two_, 17, "salt")), -1);
}

TEST_F(BlockPoolTest, OfTwoContentsWithOneHashTheLaterStays) {
  const BlockId first = Allocate();
  const BlockId second = Allocate();
  pool_.Cache(first, Content('a', one_two_));
  Release({first});
  pool_.Cache(second, Content('a', three_four_));
  pool_.CheckInvariants();
  EXPECT_EQ(Find(Content('a', one_two_)), -1);
  EXPECT_EQ(Find(Content('a', three_four_)), second);
  EXPECT_EQ(Allocate(), first);  // it holds nothing now
}

TEST_F(BlockPoolTest, AnEvictedPredecessorIsNotMistakenForItsSuccessor) {
  const BlockId head = Allocate();
  const BlockId tail = Allocate();
  const ContentId old_head = pool_.Cache(head, Content('a', one_two_));
  pool_.Cache(tail, Content('b', three_four_, old_head));
  Release({head});
  EXPECT_EQ((std::vector<BlockId>{Allocate(), Allocate()}).back(), head);
  const ContentId new_head = pool_.Cache(head, Content('a', one_two_));
  EXPECT_NE(new_head, old_head);
  EXPECT_EQ(Find(Content('b', three_four_, new_head)), -1);
}

TEST_F(BlockPoolTest, DropCacheForgetsAllAndKeepsReferences) {
  const BlockId used = Allocate();
  pool_.Cache(used, Content('a', one_two_));
  CacheAndRelease('b', three_four_);
  pool_.DropCache();
  pool_.CheckInvariants();
  EXPECT_EQ(Find(Content('a', one_two_)), -1);
  EXPECT_EQ(Find(Content('b', three_four_)), -1);
  EXPECT_EQ(pool_.num_references(used), 1);
  EXPECT_EQ(pool_.num_free(), 2);
}

using BlockPoolDeathTest = BlockPoolTest;

TEST_F(BlockPoolDeathTest, ReleasingWhatNobodyHoldsAborts) {
  EXPECT_DEATH(pool_.Release(std::vector<BlockId>{0}), "num_references > 0");
}

TEST_F(BlockPoolDeathTest, CachingAFreeBlockAborts) {
  EXPECT_DEATH(pool_.Cache(0, Content('a', one_two_)), "num_references > 0");
}

TEST_F(BlockPoolTest, ATableGivesItsBlocksBackHoweverItEnds) {
  {
    BlockTable table;
    table.AppendNew(&pool_, 2);
    EXPECT_EQ(pool_.num_free(), 1);
    BlockTable moved = std::move(table);
    EXPECT_EQ(moved.size(), 2);
    EXPECT_EQ(pool_.num_free(), 1);
    BlockTable assigned;
    assigned.AppendNew(&pool_, 1);
    assigned = std::move(moved);
    EXPECT_EQ(pool_.num_free(), 1);
    assigned.Clear();
    EXPECT_EQ(pool_.num_free(), 3);
    assigned.AppendNew(&pool_, 3);
  }
  EXPECT_EQ(pool_.num_free(), 3);
  pool_.CheckInvariants();
}

TEST(BlockHashTest, IsSha256OfTheHashBeforeAndTheTokens) {
  // From Python: hashlib.sha256(b"salt" + b"x"), and of that digest + struct.pack("<2i", 1, -2).
  EXPECT_EQ(Hex(HashSalt("x")), "c9ef43a03d58f2cb9b0c4b069c179595739f5181a5565c8db5dbb124564ea819");
  EXPECT_EQ(Hex(HashBlock(HashSalt("x"), {1, -2})),
            "1e9ca7ffe7fce867a28d03b81e608f5f328a8d6f70d783a919dc704177d05ffd");
}

TEST(BlockHashTest, DependsOnAllThatCameBefore) {
  const std::vector<TokenId> tokens(kBlockSize, 7);
  const BlockHash root = HashSalt("");
  EXPECT_FALSE(HashBlock(root, tokens) == HashBlock(HashBlock(root, tokens), tokens));
  EXPECT_FALSE(HashBlock(root, tokens) == HashBlock(HashSalt("other"), tokens));
}

}  // namespace
}  // namespace latentd
