#include "trie/trie.h"

#include <algorithm>
#include <limits>

#include "trie/errors.h"

namespace saffron {
namespace {

uint64_t sibling_key(int32_t parent, int32_t token) {
  return uint64_t{static_cast<uint32_t>(parent)} << 32 | static_cast<uint32_t>(token);
}

void check_tokens(Span<int32_t> tokens) {
  for (int64_t i = 0; i < tokens.size; ++i) {
    if (tokens[i] < 0) invalid(item("tokens", i, tokens[i]) + ": has to be >= 0");
  }
}

void check_same_size(Span<int32_t> parents, Span<int32_t> tokens) {
  if (parents.size != tokens.size) {
    invalid("parents and tokens have to be equally long, got " + std::to_string(parents.size) +
            " and " + std::to_string(tokens.size));
  }
}

void check_offsets(Span<int64_t> offsets, int64_t total) {
  if (offsets.size < 1) invalid("offsets: needs at least one entry, 0");
  for (int64_t i = 1; i < offsets.size; ++i) {
    if (offsets[i] < offsets[i - 1]) {
      invalid(item("offsets", i, offsets[i]) + ": has to be >= the entry before it");
    }
  }
  if (offsets[0] != 0 || offsets[offsets.size - 1] != total) {
    invalid("offsets: has to run from 0 to len(tokens) = " + std::to_string(total) + ", got " +
            std::to_string(offsets[0]) + " to " + std::to_string(offsets[offsets.size - 1]));
  }
}

}  // namespace

CacheFullError::CacheFullError(int64_t needed, int64_t free, int64_t evictable, int64_t capacity)
    : std::runtime_error("the cache is full: " + std::to_string(needed) + " slots needed, " +
                         std::to_string(free) + " free, " + std::to_string(evictable) +
                         " can be evicted, capacity " + std::to_string(capacity)) {}

Trie::Trie(int64_t capacity) { grow(capacity); }

void Trie::grow(int64_t capacity) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  if (capacity < capacity_ || capacity > kMax) {
    invalid("capacity = " + std::to_string(capacity) + ": has to be between " +
            std::to_string(capacity_) + " and " + std::to_string(kMax));
  }
  for (auto* column : {&parent_, &token_, &first_child_, &children_, &holds_, &locks_, &local_}) {
    column->resize(capacity);
  }
  used_.resize(capacity);
  free_.grow(capacity);
  for (int64_t slot = capacity_; slot < capacity; ++slot) free_.insert(static_cast<int32_t>(slot));
  capacity_ = capacity;
}

// ---- The forest: children, creation and removal of single nodes ----

int32_t Trie::find_child(int32_t parent, int32_t token) const {
  const int32_t next = parent + 1;  // where a chain that was inserted at once goes on
  if (next < capacity_ && parent_[next] == parent && token_[next] == token) return next;
  const int32_t first = first_child_[parent];
  if (first != kNone && token_[first] == token) return first;
  if (children_[parent] == (first != kNone)) return kNone;
  const auto sibling = siblings_.find(sibling_key(parent, token));
  return sibling == siblings_.end() ? kNone : sibling->second;
}

/// There has to be a free slot, and `parent` has to be locked (or new): it is not in evictable_.
int32_t Trie::create(int32_t parent, int32_t token) {
  const int32_t node = free_.take();
  parent_[node] = parent;
  token_[node] = token;
  if (first_child_[parent] == kNone) {
    first_child_[parent] = node;
  } else {
    siblings_.emplace(sibling_key(parent, token), node);
  }
  ++children_[parent];
  return node;
}

/// Frees a leaf that is not held and not in evictable_ (any more); returns its parent.
int32_t Trie::remove(int32_t leaf) {
  const int32_t parent = parent_[leaf];
  if (first_child_[parent] == leaf) {
    first_child_[parent] = kNone;
  } else {
    siblings_.erase(sibling_key(parent, token_[leaf]));
  }
  --children_[parent];
  used_[parent] = std::max(used_[parent], used_[leaf]);
  used_[leaf] = 0;
  parent_[leaf] = kUnused;
  free_.insert(leaf);
  return parent;
}

// ---- Holds, time of use, eviction ----

void Trie::touch(int32_t node) {
  const bool listed = evictable(node);
  if (listed) evictable_.erase(used_[node]);
  used_[node] = ++clock_;
  if (listed) enlist(node);
}

void Trie::lock(int32_t node) {
  for (; node != kNone && locks_[node]++ == 0; node = parent_[node]) {
    ++num_held_;
    if (children_[node] == 0) evictable_.erase(used_[node]);
  }
}

void Trie::unlock(int32_t node) {
  for (; node != kNone && --locks_[node] == 0; node = parent_[node]) {
    --num_held_;
    if (children_[node] == 0) enlist(node);
  }
}

void Trie::hold_one(int32_t node) {
  ++holds_[node];
  lock(node);
}

void Trie::check_nodes(Span<int32_t> nodes, const char* name, bool root_allowed) const {
  for (int64_t i = 0; i < nodes.size; ++i) {
    if (!is_node(nodes[i]) && !(root_allowed && nodes[i] == kNone)) {
      invalid(item(name, i, nodes[i]) + ": is no cached node");
    }
  }
}

/// Takes one hold an entry, or none if there are not as many. The locks that stand for them stay.
void Trie::take_holds(Span<int32_t> nodes) {
  for (int64_t i = 0; i < nodes.size; ++i) {
    if (holds_[nodes[i]] == 0) {
      for (int64_t j = 0; j < i; ++j) ++holds_[nodes[j]];
      invalid(item("nodes", i, nodes[i]) + ": is not held" + (i ? " as often as it is named" : ""));
    }
    --holds_[nodes[i]];
  }
}

/// Removes `node`, unless it is in use or gone, and then its ancestors for as long as nothing else
/// needs them.
void Trie::prune(int32_t node) {
  if (!is_node(node) || !evictable(node)) return;
  evictable_.erase(used_[node]);
  while (evictable(node)) node = remove(node);
}

void Trie::hold(Span<int32_t> nodes) {
  check_nodes(nodes, "nodes");
  for (int32_t node : nodes) {
    hold_one(node);
    touch(node);
  }
}

void Trie::release(Span<int32_t> nodes, bool discard) {
  check_nodes(nodes, "nodes");
  take_holds(nodes);
  for (int32_t node : nodes) unlock(node);
  for (int32_t node : nodes) touch(node);
  if (!discard) return;
  for (int32_t node : nodes) prune(node);
}

int64_t Trie::evict(int64_t count) {
  if (count < 0) invalid("count = " + std::to_string(count) + ": has to be >= 0");
  int64_t evicted = 0;
  while (evicted < count && !evictable_.empty()) {
    int32_t node = evictable_.begin()->second;
    evictable_.erase(evictable_.begin());
    do {  // up the chain, without a way through the map for every node of it
      node = remove(node);
      ++evicted;
    } while (evicted < count && evictable(node) &&
             (evictable_.empty() || used_[node] < evictable_.begin()->first));
    if (evictable(node)) enlist(node);
  }
  return evicted;
}

/// Locks `kept` and unlocks `dropped` if `needed` nodes then fit in, evicting others; else throws,
/// nothing changed.
void Trie::lock_if_room(Span<int32_t> kept, Span<int32_t> dropped, int64_t needed) {
  for (int32_t node : kept) lock(node);
  for (int32_t node : dropped) unlock(node);
  const int64_t evictable = num_nodes() - num_held_;
  if (needed <= num_free() + evictable) return;
  for (int32_t node : dropped) lock(node);
  for (int32_t node : kept) unlock(node);
  throw CacheFullError(needed, num_free(), evictable, capacity_);
}

// ---- Matching and growing sequences ----

Ints Trie::match(Span<int32_t> tokens) {
  check_tokens(tokens);
  Ints slots;
  int32_t node = kNone;
  for (int32_t token : tokens) {
    const int32_t child = find_child(node, token);
    if (child == kNone) break;
    slots.push_back(node = child);
  }
  if (node != kNone) touch(node);
  return slots;
}

/// Number of different prefixes that are not cached, `found` saying how far each sequence is.
int64_t Trie::count_missing(Span<int32_t> tokens, Span<int64_t> offsets,
                            const Inserted& found) const {
  const auto begin = [&](int64_t i) { return tokens.data + offsets[i] + found.matched[i]; };
  const auto end = [&](int64_t i) { return tokens.data + offsets[i + 1]; };
  std::vector<int64_t> sequences;
  for (int64_t i = 0; i + 1 < offsets.size; ++i) {
    if (begin(i) != end(i)) sequences.push_back(i);
  }
  // Only sequences that leave the trie at the same node can share new nodes. In lexicographic order
  // each one shares the most with the one before it.
  std::sort(sequences.begin(), sequences.end(), [&](int64_t a, int64_t b) {
    if (found.leaves[a] != found.leaves[b]) return found.leaves[a] < found.leaves[b];
    return std::lexicographical_compare(begin(a), end(a), begin(b), end(b));
  });
  int64_t missing = 0;
  for (size_t k = 0; k < sequences.size(); ++k) {
    const int64_t i = sequences[k];
    missing += end(i) - begin(i);
    if (k == 0 || found.leaves[sequences[k - 1]] != found.leaves[i]) continue;
    const int64_t before = sequences[k - 1];
    missing -= std::mismatch(begin(i), end(i), begin(before), end(before)).first - begin(i);
  }
  return missing;
}

Trie::Inserted Trie::insert(Span<int32_t> tokens, Span<int64_t> offsets) {
  check_tokens(tokens);
  check_offsets(offsets, tokens.size);
  const int64_t sequences = offsets.size - 1;
  Inserted result;
  Ints kept;
  int64_t needed = 0;
  for (int64_t i = 0; i < sequences; ++i) {
    int32_t node = kNone;
    int64_t t = offsets[i];
    for (int32_t child; t < offsets[i + 1]; ++t, node = child) {
      if ((child = find_child(node, tokens[t])) == kNone) break;
    }
    result.leaves.push_back(node);
    result.matched.push_back(t - offsets[i]);
    needed += offsets[i + 1] - t;
    if (node != kNone) kept.push_back(node);
  }
  // So far counted as if nothing new were shared, which is as good while there are free slots.
  if (needed > num_free()) needed = count_missing(tokens, offsets, result);
  lock_if_room(kept, {nullptr, 0}, needed);
  evict(std::max<int64_t>(0, needed - num_free()));

  result.created.reserve(static_cast<size_t>(needed));
  for (int64_t i = 0; i < sequences; ++i) {
    int32_t node = result.leaves[i];
    int64_t t = offsets[i] + result.matched[i];
    for (int32_t child; t < offsets[i + 1]; ++t, node = child) {
      if ((child = find_child(node, tokens[t])) == kNone) break;
    }
    for (; t < offsets[i + 1]; ++t) {
      result.created.push_back(node = create(node, tokens[t]));
    }
    result.leaves[i] = node;
    if (node == kNone) continue;
    hold_one(node);
    touch(node);
  }
  for (int32_t node : kept) unlock(node);
  return result;
}

/// extend() that first gives up `dead`, nodes whose holds have been taken already.
Ints Trie::extend_pruning(Span<int32_t> parents, Span<int32_t> tokens, Span<int32_t> dead) {
  Ints children, kept;
  std::vector<uint64_t> missing;
  for (int64_t i = 0; i < parents.size; ++i) {
    const int32_t child = find_child(parents[i], tokens[i]);
    children.push_back(child);
    if (child == kNone) missing.push_back(sibling_key(parents[i], tokens[i]));
    const int32_t keep = child == kNone ? parents[i] : child;
    if (keep != kNone) kept.push_back(keep);
  }
  if (static_cast<int64_t>(missing.size()) > num_free()) {
    std::sort(missing.begin(), missing.end());
    missing.erase(std::unique(missing.begin(), missing.end()), missing.end());
  }
  const int64_t needed = static_cast<int64_t>(missing.size());
  lock_if_room(kept, dead, needed);

  for (int32_t node : dead) touch(node);
  for (int32_t node : dead) prune(node);
  evict(std::max<int64_t>(0, needed - num_free()));
  for (int64_t i = 0; i < parents.size; ++i) {
    int32_t& child = children[i];
    if (child == kNone)
      child = find_child(parents[i], tokens[i]);  // an earlier entry may have made it
    if (child == kNone) child = create(parents[i], tokens[i]);
    hold_one(child);
    touch(child);
  }
  for (int32_t node : kept) unlock(node);
  return children;
}

Ints Trie::extend(Span<int32_t> parents, Span<int32_t> tokens) {
  check_same_size(parents, tokens);
  check_nodes(parents, "parents", /*root_allowed=*/true);
  check_tokens(tokens);
  return extend_pruning(parents, tokens, {nullptr, 0});
}

Ints Trie::advance(Span<int32_t> nodes, Span<int32_t> parents, Span<int32_t> tokens) {
  check_nodes(nodes, "nodes");
  check_same_size(parents, tokens);
  check_tokens(tokens);
  for (int64_t j = 0; j < parents.size; ++j) {
    if (parents[j] < 0 || parents[j] >= nodes.size) {
      invalid(item("parents", j, parents[j]) +
              ": has to be an index into nodes, of which there are " + std::to_string(nodes.size));
    }
    if (j && parents[j] < parents[j - 1]) {
      invalid(item("parents", j, parents[j]) + ": has to be >= the entry before it");
    }
  }
  Ints dead, parting, alive;  // without a child in this step; with one; one entry per child
  int64_t j = 0;
  for (int64_t i = 0; i < nodes.size; ++i) {
    (j < parents.size && parents[j] == i ? parting : dead).push_back(nodes[i]);
    for (; j < parents.size && parents[j] == i; ++j) alive.push_back(nodes[i]);
  }
  take_holds(nodes);
  Ints children;
  try {
    children = extend_pruning(alive, tokens, dead);
  } catch (const CacheFullError&) {
    for (int32_t node : nodes) ++holds_[node];
    throw;
  }
  for (int32_t node : parting) unlock(node);
  return children;
}

// ---- Views ----

Ints Trie::path(int32_t node) const {
  check_nodes({&node, 1}, "node");
  Ints tokens;
  for (; node != kNone; node = parent_[node]) tokens.push_back(token_[node]);
  std::reverse(tokens.begin(), tokens.end());
  return tokens;
}

Ints Trie::tokens(Span<int32_t> nodes) const {
  check_nodes(nodes, "nodes");
  Ints tokens;
  for (int32_t node : nodes) tokens.push_back(token_[node]);
  return tokens;
}

Ints Trie::parents(Span<int32_t> nodes) const {
  check_nodes(nodes, "nodes");
  Ints parents;
  for (int32_t node : nodes) parents.push_back(parent_[node]);
  return parents;
}

Trie::Snapshot Trie::snapshot() const {
  Snapshot result;
  for (int32_t node = 0; node < capacity_; ++node) {
    if (!is_node(node)) continue;
    result.node.push_back(node);
    result.parent.push_back(parent_[node]);
    result.token.push_back(token_[node]);
    result.holds.push_back(holds_[node]);
    result.used.push_back(used_[node]);
  }
  return result;
}

}  // namespace saffron
