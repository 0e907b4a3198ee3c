#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "trie/column.h"
#include "trie/free_slots.h"

namespace saffron {

/// An array that somebody else owns.
template <class T>
struct Span {
  const T* data;
  int64_t size;

  Span(const T* data, int64_t size) : data(data), size(size) {}
  Span(const std::vector<T>& values)  // NOLINT: a vector is passed as it is
      : data(values.data()), size(static_cast<int64_t>(values.size())) {}
  const T& operator[](int64_t i) const { return data[i]; }
  const T* begin() const { return data; }
  const T* end() const { return data + size; }
};

using Ints = std::vector<int32_t>;

/// More nodes are needed than are free or can be evicted.
struct CacheFullError : std::runtime_error {
  CacheFullError(int64_t needed, int64_t free, int64_t evictable, int64_t capacity);
};

/// Index of cached tokens: a forest in which one node is one token and its id is the token's KV
/// slot.
///
/// Two rules carry all the rest:
/// - A node is *held* while somebody holds it or a node below it. What is held is never evicted.
/// - A node is used when a call names it or a sequence that runs through it. Eviction takes leaves
/// that are not
///   held, the least recently used first; within a call a later entry counts as used later.
///
/// Every call does all of its work or throws and changes nothing: std::invalid_argument names the
/// argument, CacheFullError is checked before the first eviction. Not thread-safe.
class Trie {
 public:
  struct Inserted {
    Ints leaves;                   // per sequence; -1 for an empty one
    std::vector<int64_t> matched;  // per sequence: tokens cached before the call
    Ints created;                  // new nodes, parents before children
  };
  struct Plan {
    Ints order;             // per query number: index into the input
    Ints slot, begin, end;  // per node at or above a query, in preorder
    Ints depth;             // per query number: ancestors
  };
  struct Snapshot {
    Ints node, parent, token, holds;  // per node, ascending
    std::vector<int64_t> used;        // 0, or the time the node itself was last named
  };

  explicit Trie(int64_t capacity);

  int64_t capacity() const { return capacity_; }
  int64_t num_nodes() const { return capacity_ - free_.size(); }
  int64_t num_free() const { return free_.size(); }
  int64_t num_held() const { return num_held_; }

  void grow(int64_t capacity);

  /// Slots of the longest cached prefix of `tokens`.
  Ints match(Span<int32_t> tokens);
  /// Sequence i is tokens[offsets[i] .. offsets[i + 1]); each non-empty leaf gets one hold.
  Inserted insert(Span<int32_t> tokens, Span<int64_t> offsets);
  /// One child an entry (parent -1: a root), found or created; each gets one hold.
  Ints extend(Span<int32_t> parents, Span<int32_t> tokens);
  /// One step of a beam search: extends nodes[parents[j]] by tokens[j] and drops one hold of each
  /// of `nodes`.
  Ints advance(Span<int32_t> nodes, Span<int32_t> parents, Span<int32_t> tokens);

  void hold(Span<int32_t> nodes);
  void release(Span<int32_t> nodes, bool discard);
  int64_t evict(int64_t count);

  /// Numbers the queries in preorder, with the tokens each one sees as intervals. O(nodes
  /// returned).
  Plan plan(Span<int32_t> queries);

  Ints path(int32_t node) const;
  Ints tokens(Span<int32_t> nodes) const;
  Ints parents(Span<int32_t> nodes) const;
  Snapshot snapshot() const;

 private:
  static constexpr int32_t kNone = -1;    // above the roots; no child
  static constexpr int32_t kUnused = -2;  // parent of a slot that is no node

  /// The nodes at or above a query while plan() works, one column per property: one struct per node
  /// is twice as slow.
  struct Entries {
    Ints node;
    Ints up;              // entry of the parent
    Ints query;           // index into the input, or kNone
    Ints nodes, queries;  // at or below this one
    Ints path;            // up from one query
  };

  bool is_node(int64_t node) const {
    return node >= 0 && node < capacity_ && parent_[static_cast<int32_t>(node)] != kUnused;
  }
  bool evictable(int32_t node) const {
    return node >= 0 && children_[node] == 0 && locks_[node] == 0;
  }
  void check_nodes(Span<int32_t> nodes, const char* name, bool root_allowed = false) const;

  int32_t find_child(int32_t parent, int32_t token) const;
  int32_t create(int32_t parent, int32_t token);
  int32_t remove(int32_t leaf);

  void enlist(int32_t leaf) { evictable_.emplace(used_[leaf], leaf); }
  void touch(int32_t node);
  void lock(int32_t node);
  void unlock(int32_t node);
  void hold_one(int32_t node);
  void take_holds(Span<int32_t> nodes);
  void prune(int32_t node);

  int64_t count_missing(Span<int32_t> tokens, Span<int64_t> offsets, const Inserted& found) const;
  void lock_if_room(Span<int32_t> kept, Span<int32_t> dropped, int64_t needed);
  int32_t collect(Span<int32_t> queries);
  Ints extend_pruning(Span<int32_t> parents, Span<int32_t> tokens, Span<int32_t> dead);

  int64_t capacity_ = 0;
  int64_t num_held_ = 0;
  int64_t clock_ = 0;
  FreeSlots free_;

  Column<int32_t> parent_{kUnused}, token_{0};
  // The first child stands here, its siblings in siblings_: most nodes have one child and need no
  // hash entry.
  Column<int32_t> first_child_{kNone}, children_{0};
  std::unordered_map<uint64_t, int32_t> siblings_;  // (parent, token) -> node
  // locks = holds + children that are locked themselves: locked is held, found without a walk down.
  Column<int32_t> holds_{0}, locks_{0};
  // When the node itself was named. A node passes its time on to its parent when it is removed, so
  // that a use costs O(1) and still counts for the whole path.
  Column<int64_t> used_{0};
  std::map<int64_t, int32_t>
      evictable_;  // leaves that are not held, by used_ (different for any two leaves)

  // Scratch of plan(), kept because fresh memory costs more than the work on it.
  Column<int32_t> local_{kNone};  // node -> entry, kNone outside of plan()
  Entries entries_;
};

}  // namespace saffron
