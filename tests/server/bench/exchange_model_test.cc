#include "server/bench/exchange_model.h"

#include <gtest/gtest.h>

namespace latentd {
namespace {

constexpr double kUs = 1e-6;

TEST(ExchangeModelTest, BytesOfAToken) {
  EXPECT_EQ(DispatchBytes(7168, 8), 7168 + 56 * 4 + 8 * 8);
  EXPECT_EQ(CombineBytes(7168), 14336);
}

TEST(ExchangeModelTest, OneRankExchangesNothing) {
  EXPECT_EQ(CollectiveSeconds({}, 1, 1, 1e6), 0);
  EXPECT_EQ(CollectiveSeconds({.scheme = ExchangeScheme::kRails}, 1, 1, 1e6), 0);
}

// 16 ranks on two nodes, by hand: 15 steps, of which one between the nodes.
TEST(ExchangeModelTest, RingOfTwoNodes) {
  // Nothing to send: LL has the least latency.
  EXPECT_NEAR(CollectiveSeconds({}, 2, 8, 0), (6.6 + 14 * 0.6 * 1.8 + 2.7) * kUs, 1e-12);
  // 64 rows: 64 * 7,456 * 15 bytes over each NVLink take 23.9 us, an eighth of them through each
  // NIC 20.8. LL128, with 0.92 of the rate, wins over LL with a quarter and Simple with all.
  const double wire = 64 * 7456 * 15 / 300e9;
  EXPECT_GT(wire, 64 * 7456 * 15 / 8.0 / 43e9);
  const double ll = (6.6 + 14 * 0.6 * 1.8 + 2.7) * kUs + 4 * wire;
  const double ll128 = (14 + 14 * 1.9 + 4) * kUs + wire / 0.92;
  const double simple = (8.4 + 14 * 3.4 + 14) * kUs + wire;
  EXPECT_LT(ll128, ll);
  EXPECT_LT(ll128, simple);
  EXPECT_NEAR(CollectiveSeconds({}, 2, 8, 64 * 7456), ll128, 1e-12);
  // 2,048 rows: bytes alone count, and Simple wins.
  EXPECT_NEAR(CollectiveSeconds({}, 2, 8, 2048 * 7456), (8.4 + 14 * 3.4 + 14) * kUs + 32 * wire,
              1e-12);
}

TEST(ExchangeModelTest, TheSlowerWireCounts) {
  const ExchangeOptions no_latency = {.latency_factor = 0};
  // Four nodes: each row passes 31 NVLinks, or 31 / 8 NICs.
  EXPECT_DOUBLE_EQ(CollectiveSeconds(no_latency, 4, 8, 1e6), 1e6 * 31 / 300e9);
  ExchangeOptions slow_nics = no_latency;
  slow_nics.infiniband_bytes = 25e9;
  EXPECT_DOUBLE_EQ(CollectiveSeconds(slow_nics, 4, 8, 1e6), 1e6 * 31 / 8 / 25e9);
  // One node has no NIC in the way.
  EXPECT_DOUBLE_EQ(CollectiveSeconds(no_latency, 1, 8, 1e6), 1e6 * 7 / 300e9);
  // One GPU a node has no NVLink.
  EXPECT_DOUBLE_EQ(CollectiveSeconds(no_latency, 3, 1, 1e6), 1e6 * 2 / 43e9);
}

TEST(ExchangeModelTest, RailsSendEachRowOnceBetweenNodes) {
  const ExchangeOptions rails = {.scheme = ExchangeScheme::kRails, .latency_factor = 0};
  EXPECT_DOUBLE_EQ(CollectiveSeconds(rails, 2, 8, 1e6), 1e6 / 43e9 + 1e6 * 2 * 7 / 300e9);
  EXPECT_DOUBLE_EQ(CollectiveSeconds(rails, 4, 8, 1e6), 3e6 / 43e9 + 1e6 * 4 * 7 / 300e9);
  // Few bytes: two short rings instead of a long one.
  EXPECT_NEAR(CollectiveSeconds({.scheme = ExchangeScheme::kRails}, 2, 8, 0),
              (6.6 + 2.7 + 6.6 + 7 * 0.6) * kUs, 1e-12);
}

TEST(ExchangeModelTest, MoreBytesAndRanksNeverTakeLess) {
  for (const ExchangeScheme scheme : {ExchangeScheme::kRing, ExchangeScheme::kRails}) {
    const ExchangeOptions options = {.scheme = scheme};
    double last = 0;
    for (double bytes = 1; bytes < 1e9; bytes *= 1.7) {
      const double seconds = CollectiveSeconds(options, 2, 8, bytes);
      EXPECT_GE(seconds, last);
      EXPECT_GT(CollectiveSeconds(options, 4, 8, bytes), seconds);
      last = seconds;
    }
  }
}

}  // namespace
}  // namespace latentd
