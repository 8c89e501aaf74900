// Group packing without Python: whole prompt groups into token rows, and one global batch onto data parallel ranks.
//
// Every rank computes its plan on its own, so a plan may depend on nothing but its arguments: sorts break ties by index,
// costs become integers (sums are then exact in any order), and no clock, hash or random number is read.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <numeric>
#include <optional>
#include <queue>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace megafuse {

using Ints = std::vector<int64_t>;
using Row = Ints;                // group indices
using Rows = std::vector<Row>;
using Plan = std::vector<Rows>;  // [rank][row]

struct DataError : std::runtime_error {  // becomes megafuse.errors.DataError
  using std::runtime_error::runtime_error;
};
struct ConfigError : std::runtime_error {  // becomes megafuse.errors.ConfigError
  using std::runtime_error::runtime_error;
};

constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max();  // n of these never overflow an int64 sum
constexpr int64_t kMaxRanks = int64_t{1} << 16;
constexpr size_t kSlackSearchGroups = 4096;  // above this, best fit is close to the bound anyway
constexpr int64_t kSlackSearchSteps = 200'000;  // a few milliseconds for a whole packing

inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

inline void check_tokens(const Ints& tokens, int64_t budget) {
  if (budget < 1 || budget > kMaxTokens)
    throw ConfigError("the row budget is " + std::to_string(budget) + " tokens, not one of 1.." +
                      std::to_string(kMaxTokens) + "; fix: give the number of tokens of one row, such as 8192");
  if (tokens.empty()) throw DataError("there are no groups to pack; fix: see which filter of the build dropped them all");
  const auto bad = std::find_if(tokens.begin(), tokens.end(), [&](int64_t t) { return t < 1 || t > budget; });
  if (bad == tokens.end()) return;
  const std::string group = "group " + std::to_string(bad - tokens.begin()) + " has " + std::to_string(*bad) + " tokens";
  if (*bad < 1) throw DataError(group + ", a group needs at least one; fix: build the data set again");
  throw DataError(group + ", more than the row budget of " + std::to_string(budget) +
                  ", and a group is never split; fix: raise the budget to at least " +
                  std::to_string(*std::max_element(tokens.begin(), tokens.end())) +
                  " (the largest group), or build with fewer sources or shorter responses");
}

// By falling key, equal keys by rising index.
inline void sort_by_size(Ints& indices, const Ints& key) {
  std::sort(indices.begin(), indices.end(), [&](int64_t a, int64_t b) {
    return key[a] != key[b] ? key[a] > key[b] : a < b;
  });
}

inline Ints largest_first(const Ints& key) {
  Ints order(key.size());
  std::iota(order.begin(), order.end(), int64_t{0});
  sort_by_size(order, key);
  return order;
}

inline int64_t sum_of(const Row& row, const Ints& value) {
  int64_t sum = 0;
  for (int64_t g : row) sum += value[g];
  return sum;
}

// Best-fit decreasing: each group goes into the fullest row that still holds it. Open rows hang in a map by their free
// tokens, which has at most min(n, cap) keys, so the whole takes O(n log min(n, cap)). Nothing if max_rows is exceeded.
inline std::optional<Rows> best_fit(const Ints& tokens, const Ints& order, int64_t cap, size_t max_rows) {
  Rows rows;
  std::map<int64_t, Ints> open;  // free tokens -> rows
  for (int64_t group : order) {
    int64_t row, free;
    auto fit = open.lower_bound(tokens[group]);
    if (fit == open.end()) {
      if (rows.size() == max_rows) return std::nullopt;
      row = static_cast<int64_t>(rows.size());
      free = cap;
      rows.emplace_back();
    } else {
      free = fit->first;
      row = fit->second.back();
      fit->second.pop_back();
      if (fit->second.empty()) open.erase(fit);
    }
    rows[row].push_back(group);
    free -= tokens[group];
    if (free > 0) open[free].push_back(row);
  }
  return rows;
}

// Depth-first search for the subset of `size` (falling) that leaves the least of `slack` unused.
struct SlackSearch {
  const Ints& size;
  int64_t steps;
  int64_t least = std::numeric_limits<int64_t>::max();
  Ints chosen{}, best{};

  void run(size_t from, int64_t slack) {
    if (slack < least) {
      least = slack;
      best = chosen;
    }
    auto i = std::lower_bound(size.begin() + static_cast<std::ptrdiff_t>(from), size.end(), slack, std::greater<>());
    while (i != size.end() && least > 0 && steps > 0) {
      --steps;
      const auto at = static_cast<size_t>(i - size.begin());
      chosen.push_back(static_cast<int64_t>(at));
      run(at + 1, slack - *i);
      chosen.pop_back();
      i = std::upper_bound(i, size.end(), *i, std::greater<>());  // an equal size here would repeat the search
    }
  }
};

// Minimum bin slack (Gupta and Ho, 1999): close one row after the other, the largest group left plus the subset of the
// others that fills it best. Stronger than best fit where a row holds a handful of groups; only for small n.
inline Rows least_slack(const Ints& tokens, Ints order, int64_t cap) {
  Rows rows;
  int64_t steps = kSlackSearchSteps;
  while (!order.empty()) {
    Ints size;
    for (size_t i = 1; i < order.size(); ++i) size.push_back(tokens[order[i]]);
    const int64_t granted = std::max<int64_t>(steps / 16, 256);  // never less than one greedy descent needs
    SlackSearch search{size, granted};
    search.run(0, cap - tokens[order[0]]);
    steps -= granted - search.steps;
    Row row{order[0]};
    order[0] = -1;
    for (int64_t i : search.best) row.push_back(std::exchange(order[static_cast<size_t>(i) + 1], -1));
    order.erase(std::remove(order.begin(), order.end(), -1), order.end());
    rows.push_back(std::move(row));
  }
  return rows;
}

// As few rows of at most `cap` tokens as we can find; the search stops as soon as `enough` rows do.
inline Rows pack_tokens(const Ints& tokens, const Ints& order, int64_t cap, int64_t enough) {
  Rows rows = *best_fit(tokens, order, cap, tokens.size());
  if (static_cast<int64_t>(rows.size()) <= enough || tokens.size() > kSlackSearchGroups) return rows;
  Rows tight = least_slack(tokens, order, cap);
  return tight.size() < rows.size() ? tight : rows;
}

// Rows that no packing can do without: total volume, and groups of more than half a row, no two of which share one.
inline int64_t fewest_rows(const Ints& tokens, int64_t budget) {
  const int64_t total = std::accumulate(tokens.begin(), tokens.end(), int64_t{0});
  const auto big = std::count_if(tokens.begin(), tokens.end(), [&](int64_t t) { return t > budget - t; });
  return std::max<int64_t>(ceil_div(total, budget), big);
}

// Indices rise inside a row; rows by falling token count, then by first index: the one that is not full comes last.
inline void sort_rows(Rows& rows, const Ints& tokens) {
  std::vector<std::tuple<int64_t, int64_t, size_t>> keys;
  for (size_t r = 0; r < rows.size(); ++r) {
    std::sort(rows[r].begin(), rows[r].end());
    keys.emplace_back(-sum_of(rows[r], tokens), rows[r].empty() ? -1 : rows[r][0], r);
  }
  std::sort(keys.begin(), keys.end());
  Rows sorted;
  for (const auto& key : keys) sorted.push_back(std::move(rows[std::get<2>(key)]));
  rows = std::move(sorted);
}

inline Rows pack_rows(const Ints& tokens, int64_t budget) {
  check_tokens(tokens, budget);
  Rows rows = pack_tokens(tokens, largest_first(tokens), budget, fewest_rows(tokens, budget));
  sort_rows(rows, tokens);
  return rows;
}

}  // namespace megafuse
