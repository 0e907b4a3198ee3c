// Every op of the CPU backend on several threads, called by two threads at once, in a process that
// has no OpenMP: then `parallel_for` starts threads of its own, whose order ThreadSanitizer knows.
// What they run is what OpenMP's run. Prints nothing and returns 0 if all threads gave what one
// gave. With an argument it makes a data race instead, which has to be found.

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "cpu/ops.h"
#include "cpu/threads.h"

using namespace saffron::cpu;

namespace {

constexpr int64_t kQueries = 24, kTokens = 6000, kSlots = 6100, kHeads = 4, kKvHeads = 2, kDim = 16;
constexpr int64_t kVocab = 5000, kHidden = 32, kWidth = 4, kGroups = 6;
using Bytes = std::vector<char>;

template <class T>
Tensor tensor(std::vector<T>& data, DType dtype, std::initializer_list<int64_t> shape) {
  Tensor t;
  t.data = reinterpret_cast<char*>(data.data());
  t.dtype = dtype;
  for (int64_t size : shape) t.shape[t.rank++] = size;
  int64_t stride = 1;
  for (int i = t.rank - 1; i >= 0; --i) {
    t.stride[i] = stride;
    stride *= t.shape[i];
  }
  return t;
}

struct Inputs {
  std::vector<float> q, k, v, logits, hidden, weight, bias, scores;
  std::vector<double> top_p;
  std::vector<int32_t> slot, begin, end, groups, banned, ends;

  Inputs() {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    auto fill = [&](std::vector<float>& x, int64_t size) {
      x.resize(static_cast<size_t>(size));
      for (float& value : x) value = normal(random);
    };
    fill(q, kQueries * kHeads * kDim);
    fill(k, kSlots * kKvHeads * kDim);
    fill(v, kSlots * kKvHeads * kDim);
    fill(logits, kQueries * kVocab);
    for (float& value : logits) value *= 3;
    fill(hidden, kQueries * kHidden);
    fill(weight, kVocab * kHidden);
    fill(bias, kVocab);
    fill(scores, kQueries);
    top_p.assign(kQueries, 0.8);
    for (int64_t i = 0; i < kTokens; ++i) {
      const bool shared = i < kTokens - 100 * kQueries;
      slot.push_back(static_cast<int32_t>(kSlots - 1 - i));
      begin.push_back(static_cast<int32_t>(shared ? 0 : i % kQueries));
      end.push_back(static_cast<int32_t>(shared ? kQueries : i % kQueries + 1));
    }
    for (int32_t i = 0; i < kQueries; ++i) {
      groups.push_back(i / static_cast<int32_t>(kQueries / kGroups));
      banned.push_back(i);
      ends.push_back(2 * i);
    }
  }
};

template <class T>
void keep(Bytes& result, const std::vector<T>& values) {
  const auto* bytes = reinterpret_cast<const char*>(values.data());
  result.insert(result.end(), bytes, bytes + values.size() * sizeof(T));
}

/// The bytes of all outputs. Inputs are shared with whoever else runs.
Bytes run(Inputs& in, int threads) {
  Bytes result;
  const Tensor k = tensor(in.k, DType::kFloat32, {kSlots, kKvHeads, kDim});
  const Tensor v = tensor(in.v, DType::kFloat32, {kSlots, kKvHeads, kDim});
  std::vector<float> out(kQueries * kHeads * kDim), lse(kQueries * kHeads);
  const Tensor outs = tensor(out, DType::kFloat32, {kQueries, kHeads, kDim});
  const Tensor lses = tensor(lse, DType::kFloat32, {kQueries, kHeads});
  tree_attention(
      tensor(in.q, DType::kFloat32, {kQueries, kHeads, kDim}), k, v,
      tensor(in.slot, DType::kInt32, {kTokens}), tensor(in.begin, DType::kInt32, {kTokens}),
      tensor(in.end, DType::kInt32, {kTokens}), 0.25f, std::nullopt, Tensor{}, outs, lses, threads);
  keep(result, out);
  keep(result, lse);

  std::vector<float> merged(out.size()), merged_lse(lse.size());
  merge_attention(outs, lses, outs, lses, tensor(merged, DType::kFloat32, {kQueries, kHeads, kDim}),
                  tensor(merged_lse, DType::kFloat32, {kQueries, kHeads}), threads);
  keep(result, merged);

  std::vector<float> k_rows(kTokens * kKvHeads * kDim), v_rows(k_rows.size());
  const Tensor k_row = tensor(k_rows, DType::kFloat32, {kTokens, kKvHeads, kDim});
  const Tensor v_row = tensor(v_rows, DType::kFloat32, {kTokens, kKvHeads, kDim});
  gather_kv(k, v, tensor(in.slot, DType::kInt32, {kTokens}), k_row, v_row, threads);
  keep(result, k_rows);
  std::vector<float> k_own(in.k.size()), v_own(in.v.size());
  append_kv(k_row, v_row, tensor(in.slot, DType::kInt32, {kTokens}),
            tensor(k_own, DType::kFloat32, {kSlots, kKvHeads, kDim}),
            tensor(v_own, DType::kFloat32, {kSlots, kKvHeads, kDim}), threads);
  keep(result, v_own);

  const Tensor logits = tensor(in.logits, DType::kFloat32, {kQueries, kVocab});
  const Tensor top_p = tensor(in.top_p, DType::kFloat64, {kQueries});
  const Tensor banned = tensor(in.banned, DType::kInt32, {kQueries, 1});
  Candidates found = nucleus(logits, top_p, banned, {}, threads);
  keep(result, found.tokens);
  keep(result, found.probabilities);

  const Head head{tensor(in.hidden, DType::kFloat32, {kQueries, kHidden}),
                  tensor(in.weight, DType::kFloat32, {kVocab, kHidden}),
                  tensor(in.bias, DType::kFloat32, {kVocab}), Tensor{}, 0.0f};
  const auto count = static_cast<int64_t>(found.tokens.size());
  std::vector<float> rewards(found.tokens.size());
  multifurcation_head(head, tensor(found.tokens, DType::kInt32, {count}),
                      tensor(found.offsets, DType::kInt32, {kQueries + 1}),
                      tensor(rewards, DType::kFloat32, {count}), threads);
  keep(result, rewards);

  std::vector<int32_t> parent(kGroups * kWidth), token(parent.size()), counts(kQueries);
  std::vector<float> reward(parent.size());
  std::vector<char> all_unseen(kGroups);
  const Search search{tensor(in.groups, DType::kInt32, {kQueries}),
                      top_p,
                      banned,
                      tensor(in.scores, DType::kFloat32, {kQueries}),
                      tensor(in.ends, DType::kInt32, {kQueries, 1}),
                      Tensor{},
                      Tensor{},
                      {kGroups, kWidth, Tensor{}}};
  const Beam beam{tensor(parent, DType::kInt32, {kGroups * kWidth}),
                  tensor(token, DType::kInt32, {kGroups * kWidth}),
                  tensor(reward, DType::kFloat32, {kGroups * kWidth})};
  multifurcate(logits, head, search, beam, tensor(counts, DType::kInt32, {kQueries}),
               tensor(all_unseen, DType::kBool, {kGroups}), threads);
  keep(result, parent);
  keep(result, token);
  keep(result, reward);
  return result;
}

}  // namespace

int main(int argc, char**) {
  if (argc > 1) {
    int64_t sum = 0;
    parallel_for(100, 4, [&](int64_t i, int) {
      sum += i;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));  // so that all threads come
    });
    return sum > 0 ? 0 : 1;
  }
  Inputs inputs;
  const Bytes expected = run(inputs, 1);
  std::vector<Bytes> found(2);
  for (int round = 0; round < 3; ++round) {
    std::thread other([&] { found[1] = run(inputs, 3); });
    found[0] = run(inputs, 4);
    other.join();
    for (const Bytes& one : found) {
      if (one != expected) {
        std::fprintf(stderr, "other bits on several threads\n");
        return 1;
      }
    }
  }
  return 0;
}
