#include "server/text/stop_matcher.h"

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace latentd {
namespace {

TEST(StopMatcherTest, MatchesAcrossPieces) {
  StopMatcher matcher({"\n\nUser:"}, false);
  EXPECT_EQ(matcher.Push("Hello\n"), "Hello");
  EXPECT_EQ(matcher.Push("\nUs"), "");
  EXPECT_FALSE(matcher.matched());
  EXPECT_EQ(matcher.Push("er: more"), "");
  ASSERT_TRUE(matcher.matched());
  EXPECT_EQ(matcher.match(), "\n\nUser:");
  EXPECT_EQ(matcher.Push("ignored"), "");
  EXPECT_EQ(matcher.Flush(), "");
}

TEST(StopMatcherTest, GivesOutWhatTurnsOutToBeText) {
  StopMatcher matcher({"END"}, false);
  EXPECT_EQ(matcher.Push("EN"), "");
  EXPECT_EQ(matcher.Push("EN"), "EN");
  EXPECT_EQ(matcher.Push("!"), "EN!");
  EXPECT_EQ(matcher.Push("E"), "");
  EXPECT_EQ(matcher.Flush(), "E");
  EXPECT_FALSE(matcher.matched());
}

TEST(StopMatcherTest, IncludesTheStopWhenAsked) {
  StopMatcher matcher({"END"}, true);
  EXPECT_EQ(matcher.Push("a E"), "a ");
  EXPECT_EQ(matcher.Push("ND b"), "END");
}

TEST(StopMatcherTest, TheFirstToBeCompleteWinsThenTheLongest) {
  StopMatcher first({"abcd", "bc"}, false);
  EXPECT_EQ(first.Push("abcd"), "a");
  EXPECT_EQ(first.match(), "bc");
  StopMatcher longest({"c", "abc", "bc"}, false);
  EXPECT_EQ(longest.Push("xabc"), "x");
  EXPECT_EQ(longest.match(), "abc");
}

TEST(StopMatcherTest, WithoutStopsTextPasses) {
  StopMatcher matcher({}, false);
  EXPECT_EQ(matcher.Push("abc"), "abc");
  EXPECT_EQ(matcher.Flush(), "");
}

// What the whole text should give, by trying each end of each beginning of it.
struct Expected {
  std::string text;
  std::string match;
};
Expected Naive(const std::string& text, const std::vector<std::string>& stops, bool include_stop) {
  for (size_t end = 1; end <= text.size(); ++end) {
    std::string match;
    for (const std::string& stop : stops) {
      if (text.substr(0, end).ends_with(stop) && stop.size() > match.size()) match = stop;
    }
    if (!match.empty()) return {text.substr(0, include_stop ? end : end - match.size()), match};
  }
  return {text, ""};
}

TEST(StopMatcherTest, AgreesWithTheNaiveSearchHoweverTheTextIsCut) {
  std::mt19937 random(7);
  const auto word = [&](size_t min, size_t max) {
    std::string text(min + random() % (max - min + 1), 'a');
    for (char& c : text) c = static_cast<char>('a' + random() % 2);
    return text;
  };
  int num_matched = 0;
  for (int run = 0; run < 30000; ++run) {
    std::vector<std::string> stops(random() % 4);
    for (std::string& stop : stops) stop = word(1, 6);
    const bool include_stop = random() % 2 == 0;
    const std::string text = word(0, 24);
    StopMatcher matcher(stops, include_stop);
    std::string given, seen;
    for (size_t i = 0; i < text.size();) {
      const size_t size = random() % 5;
      seen += text.substr(i, size);
      given += matcher.Push(std::string_view(text).substr(i, size));
      i += size;
      if (matcher.matched()) continue;
      // Nothing lost, nothing held that cannot become a stop string.
      ASSERT_TRUE(seen.starts_with(given));
      const std::string held = seen.substr(given.size());
      ASSERT_TRUE(held.empty() || std::any_of(stops.begin(), stops.end(),
                                              [&](const std::string& stop) {
                                                return stop.size() > held.size() &&
                                                       stop.starts_with(held);
                                              }))
          << held;
    }
    given += matcher.Flush();
    const Expected expected = Naive(text, stops, include_stop);
    ASSERT_EQ(given, expected.text) << text;
    ASSERT_EQ(matcher.matched(), !expected.match.empty());
    if (matcher.matched()) {
      ASSERT_EQ(matcher.match(), expected.match);
      ++num_matched;
    }
  }
  EXPECT_GT(num_matched, 10000);
}

}  // namespace
}  // namespace latentd
