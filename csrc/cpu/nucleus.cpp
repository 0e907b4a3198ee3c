#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "cpu/ops.h"
#include "cpu/simd/kernels.h"
#include "cpu/threads.h"

namespace saffron::cpu {
namespace {

/// The tokens that are banned in row `r`, ascending.
std::vector<int32_t> banned_tokens(const Tensor& banned, int64_t r, int64_t vocab) {
  std::vector<int32_t> sorted;
  if (banned.given()) {
    const IntView ids(banned, r);
    check_index("banned", ids, vocab, -1);
    for (int64_t i = 0; i < ids.size; ++i) {
      if (ids[i] >= 0) sorted.push_back(ids[i]);
    }
    std::sort(sorted.begin(), sorted.end());
  }
  return sorted;
}

/// What one row contributes.
struct Row {
  std::vector<int32_t> tokens;
  std::vector<float> probabilities;
};

/// Finds the nucleus of a row without a sort of the vocabulary. The row is read once, in blocks
/// that keep their largest logit and their mass. These tell from where on tokens must be collected
/// for top_p of the mass to be among them, and in which blocks such tokens are at all; only what
/// was collected is sorted.
class RowSelector {
 public:
  /// Bytes for a vocabulary of which up to so many tokens are banned.
  static int64_t memory_size(int64_t vocab, int64_t banned) {
    const int64_t blocks = blocks_of(vocab);
    const int64_t of_tokens = vocab * 20 + 8 * kCollectSlack;
    const int64_t of_blocks = blocks * 16;
    const int64_t copies = std::min(blocks, banned) * kScanTokens * int64_t{sizeof(float)};
    return (of_tokens + of_blocks + copies + 4 * 64) / 64 * 64;
  }

  RowSelector(const Tensor& logits, int64_t r, const std::vector<int32_t>& banned, double top_p,
              char* memory)
      : row_(logits.at(r)),
        dtype_(logits.dtype),
        top_p_(top_p),
        vocab_(logits.shape[1]),
        num_blocks_(blocks_of(vocab_)) {
    keys_ = take<uint64_t>(memory, vocab_ + kCollectSlack);
    spare_ = take<uint64_t>(memory, vocab_);
    block_ = take<const char*>(memory, num_blocks_);
    block_top_ = take<float>(memory, num_blocks_);
    block_mass_ = take<float>(memory, num_blocks_);
    p_ = take<float>(memory, vocab_);
    for (int64_t b = 0; b < num_blocks_; ++b)
      block_[b] = row_ + b * kScanTokens * item_size(dtype_);
    int64_t last = -1;
    for (const int32_t token : banned) {  // a block with banned tokens is replaced by a copy
      const int64_t b = token / kScanTokens, bytes = size(b) * item_size(dtype_);
      if (b != last) {
        block_[b] = static_cast<char*>(std::memcpy(memory, block_[b], static_cast<size_t>(bytes)));
        memory += kScanTokens * item_size(dtype_);
      }
      last = b;
      char* logit = const_cast<char*>(block_[b]) + token % kScanTokens * item_size(dtype_);
      const uint32_t none = 0xff800000u;  // -infinity, of which bf16 is the upper half
      const bool half = dtype_ == DType::kBFloat16;
      std::memcpy(logit, reinterpret_cast<const char*>(&none) + (half ? 2 : 0), half ? 2 : 4);
    }
  }

  int64_t num_blocks() const { return num_blocks_; }

  /// Reads these blocks; each has to be, in any order.
  void scan(int64_t begin, int64_t end) {
    kernels().scan(block_ + begin, dtype_, end - begin, size(end - 1), block_top_ + begin,
                   block_mass_ + begin);
  }

  /// The largest logit; not finite if the row has no nucleus.
  float maximum() {
    const double sum = kernels().join(block_top_, block_mass_, num_blocks_, &maximum_);
    sum_ = static_cast<float>(sum);
    const bool infinite = maximum_ == std::numeric_limits<float>::infinity();
    if (std::isnan(sum)) return infinite ? maximum_ : std::numeric_limits<float>::quiet_NaN();
    if (!(sum >= 0.5)) return -std::numeric_limits<float>::infinity();
    return maximum_;
  }

  Row select() {
    // Sums in another order round differently: the margin is larger than what that can change.
    const double enough = top_p_ * sum_ * (1 + 1e-5);
    for (double span = first_span(enough);; span = 1.25 * span + 0.5) {
      const auto threshold = static_cast<float>(double{maximum_} - span);
      int64_t count = 0;
      double mass = 0;
      for (int64_t b = 0; b < num_blocks_; ++b) {
        if (!(block_top_[b] >= threshold)) continue;
        count += kernels().collect(block_[b], dtype_, size(b), b * kScanTokens, threshold, maximum_,
                                   keys_ + count, &mass);
      }
      if (span < kFarthest && mass < enough) continue;
      return take_from(mass < enough ? count : narrow(count, span, enough));
    }
  }

 private:
  static constexpr double kFarthest = 88;  // so far below the maximum e^x is 0
  static constexpr int64_t kMostCounted = 8192;

  static int64_t blocks_of(int64_t vocab) { return (vocab + kScanTokens - 1) / kScanTokens; }
  int64_t size(int64_t b) const { return std::min(kScanTokens, vocab_ - b * kScanTokens); }

  template <class T>
  static T* take(char*& memory, int64_t count) {
    char* at = memory;
    memory += (count * int64_t{sizeof(T)} + 7) / 8 * 8;
    return reinterpret_cast<T*>(at);
  }

  float logit(int64_t b, int64_t i) const {
    const char* at = block_[b] + i * item_size(dtype_);
    uint32_t bits = 0;  // of bf16 the upper half
    const bool half = dtype_ == DType::kBFloat16;
    std::memcpy(reinterpret_cast<char*>(&bits) + (half ? 2 : 0), at, half ? 2 : 4);
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  /// A distance from the maximum within which tokens of enough mass lie, usually: all blocks
  /// together have enough mass whose largest logit is not much farther away.
  double first_span(double enough) const {
    constexpr int kBins = 256;
    constexpr float kPerBin = 0.25f;
    std::array<float, kBins> mass{};
    std::array<int32_t, kBins> blocks{};
    for (int64_t b = 0; b < num_blocks_; ++b) {
      const float bin = (maximum_ - block_top_[b]) / kPerBin;
      if (!(bin < kBins)) continue;
      mass[static_cast<size_t>(bin)] += block_mass_[b];
      ++blocks[static_cast<size_t>(bin)];
    }
    double within = 0;
    int32_t reached = 0;
    for (size_t bin = 0; bin < kBins; ++bin) {
      within += static_cast<double>(mass[bin]);
      reached += blocks[bin];
      if (within < enough) continue;
      const double span = kPerBin * static_cast<double>(bin + 1) + 0.5;
      return 4 * reached < num_blocks_ ? span : sampled_span(enough, span);
    }
    return kFarthest;
  }

  /// The same for flat rows, as a sample of the tokens tells; `otherwise` if it tells nothing.
  double sampled_span(double enough, double otherwise) const {
    constexpr int kBins = 1024, kEvery = 16;
    constexpr double kPerBin = 1. / 32;
    std::array<int32_t, kBins> in_bin{};
    for (int64_t b = 0; b < num_blocks_; ++b) {
      for (int64_t i = b % kEvery; i < size(b); i += kEvery) {
        const float below = (maximum_ - logit(b, i)) * static_cast<float>(1 / kPerBin);
        if (below < kBins) ++in_bin[static_cast<size_t>(below)];
      }
    }
    const double step = std::exp(-kPerBin);
    double middle = std::exp(kPerBin / 2), mass = 0;  // e^x in the middle of a bin
    for (int bin = 0; bin < kBins; ++bin) {
      mass += kEvery * in_bin[static_cast<size_t>(bin)] * (middle *= step);
      if (mass >= 1.02 * enough) return kPerBin * (bin + 1);
    }
    return otherwise;
  }

  /// Of `count` keys, which reach `span` below the maximum and have enough mass, those that are
  /// needed for it, as counting tells. Of many keys there are few more: that span was sampled.
  int64_t narrow(int64_t count, double span, double enough) {
    if (count < 128 || count > kMostCounted) return count;
    constexpr int kBins = 1024;
    std::array<int32_t, kBins> in_bin{};
    const float scale = kBins / static_cast<float>(span);
    for (int64_t i = 0; i < count; ++i) {
      const float below = maximum_ - value_of_key(static_cast<uint32_t>(keys_[i] >> 32));
      ++in_bin[static_cast<size_t>(std::min(static_cast<int>(below * scale), kBins - 1))];
    }
    const double step = std::exp(-span / kBins * (1 + 1e-4));  // bins are as wide but for rounding
    double least = 1, mass = 0;                                // e^x at the far end of a bin
    int last = 0;
    for (; last < kBins; ++last) {
      mass += in_bin[static_cast<size_t>(last)] * (least *= step);
      if (mass >= enough) break;
    }
    if (last >= kBins - 1) return count;
    const double far = double{maximum_} - span / kBins * (last + 1) * (1 + 1e-4);
    const uint32_t limit = descending_key(static_cast<float>(far));
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      keys_[kept] = keys_[i];
      kept += keys_[i] >> 32 <= limit;
    }
    return kept;
  }

  /// Selects among `count` tokens that are before all others.
  Row take_from(int64_t count) {
    Row row;
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
    return row;
  }

  const char* row_;
  DType dtype_;
  double top_p_;
  int64_t vocab_, num_blocks_;
  uint64_t *keys_, *spare_;
  const char** block_;
  float *block_top_, *block_mass_, *p_;
  float maximum_ = 0, sum_ = 0;
};

}  // namespace

void radix_sort(uint64_t* keys, uint64_t* spare, int64_t count) {
  if (count < 256) {
    std::sort(keys, keys + count);
    return;
  }
  uint64_t differ = 0;
  for (int64_t i = 1; i < count; ++i) differ |= keys[i] ^ keys[0];
  differ >>= 32;                // the lower halves ascend already
  constexpr int most_bits = 8;  // the places that a pass writes to fit the first-level cache
  constexpr uint64_t most_digits = 1 << most_bits;
  // Each quarter has counters of its own: of logits many in a row have the same digit, and a
  // counter that was written just now takes several cycles to be read.
  constexpr int64_t quarters = 4;
  const int64_t quarter = count / quarters;
  const auto of_quarters = [&](const auto& visit) {
    for (int64_t i = 0; i < quarter; ++i) {
      for (int64_t q = 0; q < quarters; ++q) visit(q, q * quarter + i);
    }
    for (int64_t i = quarters * quarter; i < count; ++i) visit(quarters - 1, i);
  };
  uint64_t* from = keys;
  while (differ != 0) {
    const int low = __builtin_ctzll(differ), range = 64 - __builtin_clzll(differ) - low;
    const int passes = (range + most_bits - 1) / most_bits;
    const int bits = (range + passes - 1) / passes, shift = 32 + low;
    const uint64_t digits = uint64_t{1} << bits;
    std::array<std::array<int32_t, most_digits>, quarters> at{};
    of_quarters([&](int64_t q, int64_t i) {
      ++at[static_cast<size_t>(q)][from[i] >> shift & (digits - 1)];
    });
    int32_t before = 0;
    for (uint64_t digit = 0; digit < digits; ++digit) {
      for (auto& counters : at) {
        const int32_t here = counters[digit];
        counters[digit] = before;
        before += here;
      }
    }
    of_quarters([&](int64_t q, int64_t i) {
      spare[at[static_cast<size_t>(q)][from[i] >> shift & (digits - 1)]++] = from[i];
    });
    std::swap(from, spare);
    differ &= ~((digits - 1) << low);
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
  std::vector<std::vector<int32_t>> lists;
  if (banned.rank == 2) {
    for (const int64_t r : looked_at) lists.push_back(banned_tokens(banned, r, vocab));
  } else {
    lists.push_back(banned_tokens(banned, 0, vocab));
  }
  const int64_t most_banned = banned.given() ? banned.shape[banned.rank - 1] : 0;
  const int64_t memory_size = RowSelector::memory_size(vocab, most_banned);
  char* memory = scratch(memory_size * std::max<int64_t>(1, std::min<int64_t>(threads, count)));
  std::vector<Row> found(static_cast<size_t>(rows));
  std::vector<float> maxima(static_cast<size_t>(rows));  // finite for rows that are skipped
  const auto of_row = [&](int64_t i, char* at) {
    const int64_t r = looked_at[static_cast<size_t>(i)];
    return RowSelector(logits, r, lists[banned.rank == 2 ? static_cast<size_t>(i) : 0],
                       *reinterpret_cast<const double*>(top_p.at(r)), at);
  };
  const auto finish = [&](int64_t i, RowSelector& selector) {
    const auto r = static_cast<size_t>(looked_at[static_cast<size_t>(i)]);
    maxima[r] = selector.maximum();
    if (std::isfinite(maxima[r])) found[r] = selector.select();
  };
  if (count < threads) {  // row after row; threads share the reading
    constexpr int64_t chunk = 32;
    for (int64_t i = 0; i < count; ++i) {
      RowSelector selector = of_row(i, memory);
      const int64_t blocks = selector.num_blocks();
      parallel_for((blocks + chunk - 1) / chunk, threads, [&](int64_t c, int) {
        selector.scan(c * chunk, std::min(blocks, (c + 1) * chunk));
      });
      finish(i, selector);
    }
  } else {
    parallel_for(count, threads, [&](int64_t i, int worker) {
      RowSelector selector = of_row(i, memory + worker * memory_size);
      selector.scan(0, selector.num_blocks());
      finish(i, selector);
    });
  }

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
