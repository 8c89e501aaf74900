// What a group occupies in a row, and what it costs to compute.
#pragma once

#include "packing.hpp"

namespace megafuse {

inline void check_lengths(const Ints& prompt, const Ints& response, const Ints& offsets) {
  const auto total = static_cast<int64_t>(response.size());
  if (offsets.size() != prompt.size() + 1 || offsets.front() != 0 || offsets.back() != total)
    throw DataError("offsets has " + std::to_string(offsets.size()) + " entries for " + std::to_string(prompt.size()) +
                    " prompts and " + std::to_string(total) +
                    " responses; fix: give one more than there are prompts, the first 0, the last the response count");
  for (size_t i = 0; i + 1 < offsets.size(); ++i)
    if (offsets[i] > offsets[i + 1])
      throw DataError("offsets falls from " + std::to_string(offsets[i]) + " to " + std::to_string(offsets[i + 1]) +
                      " at group " + std::to_string(i) + "; fix: give cumulative response counts");
  const auto check = [](const Ints& lengths, const char* what) {
    const auto bad = std::find_if(lengths.begin(), lengths.end(), [](int64_t x) { return x < 0 || x > kMaxTokens; });
    if (bad != lengths.end())
      throw DataError(std::string(what) + " " + std::to_string(bad - lengths.begin()) + " has a length of " +
                      std::to_string(*bad) + " tokens, not one of 0.." + std::to_string(kMaxTokens) +
                      "; fix: build the data set again");
  };
  check(prompt, "prompt");
  check(response, "response");
}

// Shared: the prompt once and every response. Not shared: every response with its own copy of the prompt.
inline Ints group_tokens(const Ints& prompt, const Ints& response, const Ints& offsets, bool prefix_sharing) {
  check_lengths(prompt, response, offsets);
  Ints tokens(prompt.size());
  for (size_t i = 0; i < prompt.size(); ++i) {
    tokens[i] = prompt[i] * (prefix_sharing ? 1 : offsets[i + 1] - offsets[i]);
    for (int64_t r = offsets[i]; r < offsets[i + 1]; ++r) tokens[i] += response[r];
  }
  return tokens;
}

// linear_cost * computed tokens + attention_cost * attended (query, key) pairs.
inline std::vector<double> group_cost(const Ints& prompt, const Ints& response, const Ints& offsets, double linear_cost,
                                      double attention_cost, bool prefix_sharing) {
  for (double c : {linear_cost, attention_cost})
    if (!std::isfinite(c) || c < 0)
      throw ConfigError("linear_cost is " + std::to_string(linear_cost) + " and attention_cost is " +
                        std::to_string(attention_cost) + "; fix: give finite numbers >= 0");
  const Ints tokens = group_tokens(prompt, response, offsets, prefix_sharing);
  const auto causal = [](int64_t length) {  // in double, exact below 2^53: the int64 product could overflow
    const auto n = static_cast<double>(length);
    return n * (n + 1) / 2;
  };
  std::vector<double> cost(prompt.size());
  for (size_t i = 0; i < prompt.size(); ++i) {
    double pairs = prefix_sharing ? causal(prompt[i]) : 0;
    for (int64_t r = offsets[i]; r < offsets[i + 1]; ++r)
      pairs += prefix_sharing ? static_cast<double>(response[r] * prompt[i]) + causal(response[r])
                              : causal(prompt[i] + response[r]);
    cost[i] = linear_cost * static_cast<double>(tokens[i]) + attention_cost * pairs;
  }
  return cost;
}

}  // namespace megafuse
