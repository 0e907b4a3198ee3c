#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string>

#include "cpu/ops.h"
#include "cpu/simd/kernels.h"
#include "cpu/threads.h"

namespace saffron::cpu {
namespace {

struct Span {
  int64_t first, count;
};

/// The vocabulary without the tokens that are banned in row `r`.
std::vector<Span> allowed_spans(const Tensor& banned, int64_t r, int64_t vocab) {
  std::vector<Span> spans;
  std::vector<int32_t> sorted;
  if (banned.given()) {
    const IntView ids(banned, r);
    check_index("banned", ids, vocab, -1);
    for (int64_t i = 0; i < ids.size; ++i) sorted.push_back(ids[i]);
    std::sort(sorted.begin(), sorted.end());
  }
  int64_t first = 0;
  for (const int32_t token : sorted) {
    if (token > first) spans.push_back({first, token - first});
    first = std::max<int64_t>(first, token + 1);
  }
  if (first < vocab) spans.push_back({first, vocab - first});
  return spans;
}

/// What one row contributes.
struct Row {
  std::vector<int32_t> tokens;
  std::vector<float> probabilities;
};

/// Finds the nucleus of a row. No sort of the vocabulary: a search over thresholds finds one above
/// which just more than top_p of the mass lies, and only what reaches it is sorted.
class RowSelector {
 public:
  static int64_t memory_size(int64_t vocab) {
    return (vocab * 24 + 16 * kCollectSlack + 63) / 64 * 64;
  }

  RowSelector(const Tensor& row, const std::vector<Span>& spans, double top_p, char* memory)
      : row_(row), spans_(spans), top_p_(top_p), vocab_(row.shape[0]) {
    keys_ = reinterpret_cast<uint64_t*>(memory);
    spare_ = keys_ + vocab_ + kCollectSlack;
    e_ = reinterpret_cast<float*>(spare_ + vocab_);
    p_ = e_ + vocab_;
  }

  /// The largest logit; not finite if the row has no nucleus.
  float maximum() {
    maximum_ = -std::numeric_limits<float>::infinity();
    for (const Span& span : spans_) {
      const float largest = kernels().largest(row_.at(span.first), row_.dtype, span.count);
      if (std::isnan(largest)) return largest;
      maximum_ = std::max(maximum_, largest);
    }
    return maximum_;
  }

  Row select() {
    int64_t after = 0;  // the last span; between spans lie banned tokens
    for (const Span& span : spans_) {
      std::fill(e_ + after, e_ + span.first, 0.f);
      after = span.first + span.count;
      kernels().exponentials(row_.at(span.first), row_.dtype, span.count, maximum_,
                             e_ + span.first);
    }
    std::fill(e_ + after, e_ + vocab_, 0.f);
    Row row;
    if (!take_from(find_threshold(), row)) take_from(kLeast, row);
    return row;
  }

 private:
  static constexpr float kLeast = std::numeric_limits<float>::min();  // below it, e is 0

  /// Some e such that those from there on weigh at least top_p, as nearly as a few passes over the
  /// row tell. Also finds the sum.
  float find_threshold() {
    std::array<float, kThresholds> thresholds;
    std::array<double, kThresholds> masses;
    double low = std::log(double{kLeast}), high = 0;  // logarithms of e: enough mass from low on
    for (int pass = 0; pass < 4; ++pass) {
      for (int j = 0; j < kThresholds; ++j) {
        // First in doubling steps, as nuclei are usually near the maximum; then evenly.
        const double at =
            pass == 0 ? -0.75 * (1 << j) : high + (low - high) * (j + 1) / kThresholds;
        thresholds[j] = static_cast<float>(std::exp(at));
      }
      if (pass == 0) thresholds[kThresholds - 1] = 0;  // everything
      kernels().masses_above(e_, vocab_, thresholds.data(), masses.data());
      if (pass == 0) sum_ = static_cast<float>(masses[kThresholds - 1]);
      const double enough = top_p_ * sum_ * (1 + 1e-6);  // sums in another order round differently
      int reached = 0;
      while (reached < kThresholds && masses[reached] < enough) ++reached;
      if (reached == kThresholds) return kLeast;
      if (pass == 0 && reached == kThresholds - 1) {
        high = std::log(double{thresholds[reached - 1]});
        continue;
      }
      if (reached > 0) high = std::log(double{thresholds[reached - 1]});
      low = std::log(double{thresholds[reached]});
      if (masses[reached] - (reached > 0 ? masses[reached - 1] : 0) < 0.02 * sum_) break;
    }
    return static_cast<float>(std::exp(low) * (1 - 1e-5));
  }

  /// Selects among the tokens whose e reaches a threshold. False if their mass does not reach
  /// top_p.
  bool take_from(float threshold, Row& row) {
    const int64_t count =
        kernels().collect(row_.data, row_.dtype, e_, vocab_, std::max(threshold, kLeast), keys_);
    radix_sort(keys_, spare_, count);
    kernels().probabilities(keys_, count, maximum_, sum_, p_);
    double mass = 0;
    int64_t size = 0;
    for (; size < count; ++size) {
      const double with = mass + p_[size];
      if (!(with - p_[size] < top_p_) || !(p_[size] > 0)) break;
      mass = with;
    }
    row.tokens.resize(static_cast<size_t>(size));
    for (int64_t i = 0; i < size; ++i) {
      row.tokens[static_cast<size_t>(i)] = static_cast<int32_t>(keys_[i]);
    }
    row.probabilities.assign(p_, p_ + size);
    return size < count || mass >= top_p_;
  }

  const Tensor& row_;
  const std::vector<Span>& spans_;
  double top_p_;
  int64_t vocab_;
  uint64_t *keys_, *spare_;
  float *e_, *p_;
  float maximum_ = 0, sum_ = 0;
};

}  // namespace

void radix_sort(uint64_t* keys, uint64_t* spare, int64_t count) {
  if (count < 256) {
    std::stable_sort(keys, keys + count, [](uint64_t a, uint64_t b) { return a >> 32 < b >> 32; });
    return;
  }
  constexpr int digit_bits = 11;
  constexpr uint64_t digits = 1 << digit_bits;
  uint64_t* from = keys;
  for (int shift = 32; shift < 64; shift += digit_bits) {
    std::array<int64_t, digits> at{};
    for (int64_t i = 0; i < count; ++i) ++at[from[i] >> shift & (digits - 1)];
    if (at[from[0] >> shift & (digits - 1)] == count) continue;  // all have the same digit
    int64_t before = 0;
    for (int64_t& number : at) {
      const int64_t here = number;
      number = before;
      before += here;
    }
    for (int64_t i = 0; i < count; ++i) spare[at[from[i] >> shift & (digits - 1)]++] = from[i];
    std::swap(from, spare);
  }
  if (from != keys) std::copy(from, from + count, keys);
}

Candidates nucleus(const Tensor& logits, const Tensor& top_p, const Tensor& banned,
                   const std::vector<uint8_t>& skip, int threads) {
  const int64_t rows = logits.shape[0], vocab = logits.shape[1];
  std::vector<int64_t> looked_at;
  for (int64_t r = 0; r < rows; ++r) {
    if (!skip.empty() && skip[static_cast<size_t>(r)]) continue;
    looked_at.push_back(r);
    const double mass = *reinterpret_cast<const double*>(top_p.at(r));
    if (!(mass > 0 && mass <= 1)) {
      throw std::invalid_argument("top_p: row " + std::to_string(r) + " holds " +
                                  std::to_string(mass) +
                                  ", expected a number above 0 and at most 1");
    }
  }
  const auto count = static_cast<int64_t>(looked_at.size());
  // One list for all rows, or one for each.
  std::vector<std::vector<Span>> spans;
  if (banned.rank == 2) {
    for (const int64_t r : looked_at) spans.push_back(allowed_spans(banned, r, vocab));
  } else {
    spans.push_back(allowed_spans(banned, 0, vocab));
  }
  const int64_t memory_size = RowSelector::memory_size(vocab);
  char* memory = scratch(memory_size * std::max<int64_t>(1, std::min<int64_t>(threads, count)));
  std::vector<Row> found(static_cast<size_t>(rows));
  std::vector<float> maxima(static_cast<size_t>(rows));  // finite for rows that are skipped
  parallel_for(count, threads, [&](int64_t i, int worker) {
    const int64_t r = looked_at[static_cast<size_t>(i)];
    const Tensor row{logits.at(r), logits.dtype, 1, {vocab}, {1}};
    RowSelector selector(row, spans[banned.rank == 2 ? static_cast<size_t>(i) : 0],
                         *reinterpret_cast<const double*>(top_p.at(r)),
                         memory + worker * memory_size);
    maxima[r] = selector.maximum();
    if (std::isfinite(maxima[r])) found[r] = selector.select();
  });

  Candidates all;
  all.offsets.push_back(0);
  for (int64_t r = 0; r < rows; ++r) {
    if (!std::isfinite(maxima[r])) {
      throw std::invalid_argument("logits: row " + std::to_string(r) + " has maximum " +
                                  std::to_string(maxima[r]) +
                                  "; every row needs finite logits (no NaN, no +inf) and one token "
                                  "that is neither -inf nor "
                                  "banned");
    }
    all.offsets.push_back(all.offsets.back() + static_cast<int32_t>(found[r].tokens.size()));
  }
  all.tokens.reserve(static_cast<size_t>(all.offsets.back()));
  all.probabilities.reserve(static_cast<size_t>(all.offsets.back()));
  for (const Row& row : found) {
    all.tokens.insert(all.tokens.end(), row.tokens.begin(), row.tokens.end());
    all.probabilities.insert(all.probabilities.end(), row.probabilities.begin(),
                             row.probabilities.end());
  }
  return all;
}

}  // namespace saffron::cpu
