// One global batch onto data parallel ranks: the same number of rows everywhere, total costs even, longest row short.
#pragma once

#include <iterator>
#include <set>

#include "packing.hpp"

namespace megafuse {

// Costs as integers of up to 40 bits, fewer where n of them could overflow a sum.
inline Ints integer_costs(const std::vector<double>& cost) {
  double largest = 0;
  for (size_t i = 0; i < cost.size(); ++i) {
    if (!std::isfinite(cost[i]) || cost[i] < 0)
      throw DataError("the cost of group " + std::to_string(i) + " is " + std::to_string(cost[i]) +
                      ", which is negative or not finite; fix: take it from group_cost()");
    largest = std::max(largest, cost[i]);
  }
  const double scale = std::min(0x1p40, 0x1p61 / static_cast<double>(cost.size()));
  Ints units(cost.size(), 0);
  if (largest > 0)
    for (size_t i = 0; i < cost.size(); ++i) units[i] = std::llround(cost[i] / largest * scale);
  return units;
}

// The same groups in as many rows: falling sizes, each to the shortest row; kept where that lowers the longest one.
inline Rows even_out(const Ints& tokens, Rows rows) {
  Row groups;
  int64_t before = 0, after = 0;
  for (const Row& row : rows) {
    groups.insert(groups.end(), row.begin(), row.end());
    before = std::max(before, sum_of(row, tokens));
  }
  sort_by_size(groups, tokens);
  using Length = std::pair<int64_t, size_t>;
  std::priority_queue<Length, std::vector<Length>, std::greater<>> shortest;
  for (size_t r = 0; r < rows.size(); ++r) shortest.emplace(0, r);
  Rows even(rows.size());
  for (int64_t g : groups) {
    const auto [length, r] = shortest.top();
    shortest.pop();
    even[r].push_back(g);
    shortest.emplace(length + tokens[g], r);
    after = std::max(after, length + tokens[g]);
  }
  return after < before ? even : rows;
}

// Moves and swaps groups between ranks until the heaviest one cannot be relieved. Row r belongs to rank r / per_rank.
class Balancer {
 public:
  Balancer(const Ints& tokens, const Ints& cost, Rows rows, int64_t ranks, int64_t per_rank)
      : tokens_(tokens), cost_(cost), rows_(std::move(rows)), ranks_(ranks), per_rank_(per_rank),
        length_(rows_.size()), row_cost_(rows_.size()), load_(static_cast<size_t>(ranks), 0) {
    even_rows();
    for (size_t r = 0; r < rows_.size(); ++r) load_[r / static_cast<size_t>(per_rank_)] += row_cost_[r];
  }

  // Makes the longest row of each rank short; no group changes its rank.
  void even_rows() {
    for (auto first = rows_.begin(); first != rows_.end(); first += per_rank_) {
      Rows even = even_out(tokens_, Rows(first, first + per_rank_));
      std::move(even.begin(), even.end(), first);
    }
    for (size_t r = 0; r < rows_.size(); ++r) {
      length_[r] = sum_of(rows_[r], tokens_);
      row_cost_[r] = sum_of(rows_[r], cost_);
    }
  }

  int64_t heaviest() const { return *std::max_element(load_.begin(), load_.end()); }
  int64_t longest() const { return *std::max_element(length_.begin(), length_.end()); }
  const Rows& rows() const { return rows_; }

  // Local search with rows of at most `cap` tokens, until no rank costs more than `goal` or nothing helps.
  void run(int64_t cap, int64_t goal) {
    std::set<std::pair<int64_t, int64_t>> ranks;  // load, rank
    for (int64_t rank = 0; rank < ranks_; ++rank) ranks.emplace(load_[rank], rank);
    // Each step about halves one gap, so this many are plenty; the limit only bounds the time of hostile inputs.
    for (int64_t left = static_cast<int64_t>(cost_.size()) + 16 * std::min<int64_t>(ranks_, 1024); left > 0; --left) {
      const auto [load, heavy] = *ranks.rbegin();
      if (load <= goal) return;
      const std::vector<Item> groups = groups_of(heavy), rows = rows_of(heavy);
      const auto helps = [&](const auto& light) { return relieve(heavy, groups, rows, light.second, cap); };
      const auto light = std::find_if(ranks.begin(), std::prev(ranks.end()), helps);
      if (light == std::prev(ranks.end())) return;
      const int64_t helper = light->second;
      ranks.erase(light);
      ranks.erase(std::prev(ranks.end()));
      ranks.emplace(load_[heavy], heavy);
      ranks.emplace(load_[helper], helper);
    }
  }

 private:
  struct Item {  // a group and its row, or a whole row (group -1)
    int64_t cost, group, row;
    bool operator<(const Item& o) const { return std::tie(cost, group, row) < std::tie(o.cost, o.group, o.row); }
  };

  std::vector<Item> groups_of(int64_t rank) const {
    std::vector<Item> items;
    for (int64_t r = rank * per_rank_; r < (rank + 1) * per_rank_; ++r)
      for (int64_t g : rows_[r]) items.push_back({cost_[g], g, r});
    std::sort(items.begin(), items.end());
    return items;
  }

  std::vector<Item> rows_of(int64_t rank) const {
    std::vector<Item> items;
    for (int64_t r = rank * per_rank_; r < (rank + 1) * per_rank_; ++r)
      items.push_back({row_cost_[r], -1, r});
    std::sort(items.begin(), items.end());
    return items;
  }

  // The pair (one of `from`, one of `to`) whose exchange brings the two ranks closest, seen so far.
  struct Best {
    int64_t gap, left;  // load difference now, and after the exchange
    Item give{}, take{};
    bool found = false;
    void offer(int64_t delta, const Item& g, const Item& t) {
      const int64_t after = std::abs(gap - 2 * delta);
      if (after < left) {
        left = after;
        give = g;
        take = t;
        found = true;
      }
    }
  };

  // For every item of `from`, the few items of `to` (rising costs) around the one that would close the gap.
  template <class Fits>
  static void match(const std::vector<Item>& from, const std::vector<Item>& to, Best& best, Fits fits) {
    constexpr std::ptrdiff_t kAround = 6;  // candidates on either side, as the best one may not fit its row
    for (const Item& give : from) {
      const Item target{give.cost - best.gap / 2, -2, 0};
      const auto at = std::lower_bound(to.begin(), to.end(), target);
      const auto begin = at - std::min(kAround, at - to.begin());
      const auto end = at + std::min(kAround, to.end() - at);
      for (auto take = begin; take != end; ++take)
        if (fits(give, *take)) best.offer(give.cost - take->cost, give, *take);
    }
  }

  // One exchange that makes the dearer of both ranks cheaper: rows, groups, or one group handed over.
  bool relieve(int64_t heavy, const std::vector<Item>& groups, const std::vector<Item>& rows, int64_t light,
               int64_t cap) {
    const int64_t gap = load_[heavy] - load_[light];
    Best best{gap, gap};
    match(rows, rows_of(light), best, [](const Item&, const Item&) { return true; });
    match(groups, groups_of(light), best, [&](const Item& a, const Item& b) {
      const int64_t grow = tokens_[b.group] - tokens_[a.group];
      return length_[a.row] + grow <= cap && length_[b.row] - grow <= cap;
    });
    const auto first = length_.begin() + light * per_rank_;
    const Item room{0, -1, std::min_element(first, first + per_rank_) - length_.begin()};
    for (const Item& a : groups)  // the last group of a row stays, so that no row becomes empty
      if (rows_[a.row].size() > 1 && length_[room.row] + tokens_[a.group] <= cap) best.offer(a.cost, a, room);
    if (!best.found) return false;
    exchange(best.give, best.take);
    const int64_t delta = best.give.cost - best.take.cost;
    load_[heavy] -= delta;
    load_[light] += delta;
    return true;
  }

  void exchange(const Item& a, const Item& b) {
    if (a.group < 0) {
      std::swap(rows_[a.row], rows_[b.row]);
      std::swap(length_[a.row], length_[b.row]);
      std::swap(row_cost_[a.row], row_cost_[b.row]);
      return;
    }
    shift(a.group, a.row, b.row);
    if (b.group >= 0) shift(b.group, b.row, a.row);
  }

  void shift(int64_t group, int64_t from, int64_t to) {
    Row& row = rows_[from];
    row.erase(std::find(row.begin(), row.end(), group));
    rows_[to].push_back(group);
    length_[from] -= tokens_[group];
    length_[to] += tokens_[group];
    row_cost_[from] -= cost_[group];
    row_cost_[to] += cost_[group];
  }

  const Ints& tokens_;
  const Ints& cost_;
  Rows rows_;
  int64_t ranks_, per_rank_;
  Ints length_, row_cost_, load_;  // tokens of each row, cost of each row and rank
};

// Multifit (Coffman, Garey and Johnson, 1978): the shortest row length for which best fit needs no more than `bins` rows.
inline Rows shorten(const Ints& tokens, const Ints& order, Rows rows, int64_t bins) {
  int64_t high = 0, low = tokens[order[0]];
  for (const Row& row : rows) high = std::max(high, sum_of(row, tokens));
  low = std::max(low, ceil_div(std::accumulate(tokens.begin(), tokens.end(), int64_t{0}), bins));
  while (low < high) {
    const int64_t cap = low + (high - low) / 2;
    if (auto found = best_fit(tokens, order, cap, static_cast<size_t>(bins))) {
      rows = std::move(*found);
      high = cap;
    } else {
      low = cap + 1;
    }
  }
  return rows;
}

// Splits the longest rows of several groups until there are `bins` rows or every row has one group; pads with empty ones.
inline void spread(const Ints& tokens, Rows& rows, int64_t bins) {
  std::priority_queue<std::pair<int64_t, int64_t>> longest;  // tokens, -row
  for (size_t r = 0; r < rows.size(); ++r)
    if (rows[r].size() > 1) longest.emplace(sum_of(rows[r], tokens), -static_cast<int64_t>(r));
  while (static_cast<int64_t>(rows.size()) < bins && !longest.empty()) {
    const auto [length, minus_row] = longest.top();
    longest.pop();
    Row& row = rows[-minus_row];
    const int64_t last = row.back();  // packers append groups by falling size
    row.pop_back();
    if (row.size() > 1) longest.emplace(length - tokens[last], minus_row);
    rows.push_back({last});
  }
  rows.resize(static_cast<size_t>(bins));
}

// Longest processing time first: rows by falling cost, each to the cheapest rank that has room for another row.
inline Rows deal(const Ints& cost, Rows rows, int64_t ranks, int64_t per_rank) {
  Ints total;
  for (const Row& row : rows) total.push_back(sum_of(row, cost));
  using Rank = std::tuple<int64_t, int64_t, int64_t>;  // cost, rank, rows
  std::priority_queue<Rank, std::vector<Rank>, std::greater<>> cheapest;
  for (int64_t rank = 0; rank < ranks; ++rank) cheapest.emplace(0, rank, 0);
  Rows dealt(rows.size());
  for (int64_t r : largest_first(total)) {
    const auto [load, rank, used] = cheapest.top();
    cheapest.pop();
    dealt[rank * per_rank + used] = std::move(rows[r]);
    if (used + 1 < per_rank) cheapest.emplace(load + total[r], rank, used + 1);
  }
  return dealt;
}

// The other way round: groups by falling cost to the cheapest rank with tokens to spare, then rows inside each rank. It
// balances costs that do not follow the tokens, at the price of longer rows, and fails where the budget is tight.
inline std::optional<Rows> deal_groups(const Ints& tokens, const Ints& cost, int64_t budget, int64_t ranks,
                                       int64_t per_rank) {
  std::set<std::pair<int64_t, int64_t>> cheapest;  // cost, rank
  for (int64_t rank = 0; rank < ranks; ++rank) cheapest.emplace(0, rank);
  Ints room(static_cast<size_t>(ranks), budget * per_rank);
  Rows own(static_cast<size_t>(ranks));
  for (int64_t g : largest_first(cost)) {
    const auto fits = [&](const auto& entry) { return room[entry.second] >= tokens[g]; };
    const auto found = std::find_if(cheapest.begin(), cheapest.end(), fits);
    if (found == cheapest.end()) return std::nullopt;
    const auto [load, rank] = *found;
    own[rank].push_back(g);
    room[rank] -= tokens[g];
    cheapest.erase(found);
    cheapest.emplace(load + cost[g], rank);
  }
  const bool can_fill = static_cast<int64_t>(tokens.size()) >= ranks * per_rank;
  Rows dealt;
  for (Row& groups : own) {
    if (can_fill && static_cast<int64_t>(groups.size()) < per_rank) return std::nullopt;  // would leave a row empty
    sort_by_size(groups, tokens);
    auto rows = best_fit(tokens, groups, budget, static_cast<size_t>(per_rank));
    if (!rows) return std::nullopt;
    spread(tokens, *rows, per_rank);
    std::move(rows->begin(), rows->end(), std::back_inserter(dealt));
  }
  return dealt;
}

// First with rows no longer than they must be, then, if ranks stay uneven, from two starts with all that the budget
// allows. A longer row makes the padding of every rank dearer, so it has to buy a percent of the goal.
inline Rows balance(const Ints& tokens, const Ints& cost, Rows rows, int64_t budget, int64_t ranks, int64_t per_rank) {
  const int64_t total = std::accumulate(cost.begin(), cost.end(), int64_t{0});
  const int64_t bound = std::max(ceil_div(total, ranks), *std::max_element(cost.begin(), cost.end()));
  const int64_t goal = bound + bound / 1000, percent = bound / 100;
  const auto search = [&](Rows start, bool stretch) {
    Balancer balancer(tokens, cost, std::move(start), ranks, per_rank);
    balancer.run(balancer.longest(), goal);
    if (stretch && balancer.heaviest() > goal + percent) balancer.run(budget, goal);
    balancer.even_rows();
    return balancer;
  };
  const Balancer tight = search(rows, false);
  if (tight.heaviest() <= goal + percent) return tight.rows();
  std::vector<Balancer> stretched{search(std::move(rows), true)};
  if (auto dealt = deal_groups(tokens, cost, budget, ranks, per_rank))
    stretched.push_back(search(std::move(*dealt), true));
  const auto key = [&](const Balancer& b) { return std::pair(std::max(b.heaviest(), goal + percent), b.longest()); };
  const Balancer& best = *std::min_element(stretched.begin(), stretched.end(),
                                           [&](const Balancer& a, const Balancer& b) { return key(a) < key(b); });
  return best.heaviest() + percent < tight.heaviest() ? best.rows() : tight.rows();
}

inline Plan pack_batch(const Ints& tokens, const std::vector<double>& cost, int64_t budget, int64_t ranks) {
  check_tokens(tokens, budget);
  if (ranks < 1 || ranks > kMaxRanks)
    throw ConfigError("ranks is " + std::to_string(ranks) + ", not one of 1.." + std::to_string(kMaxRanks) +
                      "; fix: give the number of data parallel ranks");
  if (cost.size() != tokens.size())
    throw DataError("there are " + std::to_string(cost.size()) + " costs for " + std::to_string(tokens.size()) +
                    " groups; fix: give one cost a group");
  const Ints units = integer_costs(cost);
  const Ints order = largest_first(tokens);

  const int64_t enough = ceil_div(fewest_rows(tokens, budget), ranks) * ranks;
  Rows rows = pack_tokens(tokens, order, budget, enough);
  const int64_t per_rank = ceil_div(static_cast<int64_t>(rows.size()), ranks);
  rows = shorten(tokens, order, std::move(rows), per_rank * ranks);
  spread(tokens, rows, per_rank * ranks);
  rows = balance(tokens, units, deal(units, std::move(rows), ranks, per_rank), budget, ranks, per_rank);

  Plan plan;
  for (auto first = rows.begin(); first != rows.end(); first += per_rank) {
    plan.emplace_back(first, first + per_rank);
    sort_rows(plan.back(), tokens);
  }
  return plan;
}

}  // namespace megafuse
