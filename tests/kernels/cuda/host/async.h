#pragma once

// What asynchronous operations of Hopper need besides scheduler.h: barriers in shared memory that
// count arrivals and bytes, and the two ways ("proxies") of accessing shared memory.
//
// What is copied on account of a barrier lands when its phase is waited for, or has to be complete
// for another reason: as late as can be. Bytes of ones until then.
//
// Boxes and products of a warpgroup do not see what ordinary instructions and copies of 16 bytes
// wrote, unless a thread that knows of it fences. So: who waits for such copies, or meets others at
// a barrier after a store to where a box had been copied, is `unfenced`; a barrier hands that on
// from those who arrive to those who wait; a fence ends it. Unfenced threads must not begin a box
// or a product. Likewise a barrier counts bytes only if its initialisation was fenced before the
// next barrier of the block.

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "scheduler.h"

namespace host {

/// What it holds in shared memory is of no account.
struct Barrier {
  unsigned arrivals = 0, pending = 0, parity = 0;
  size_t expected = 0, coming = 0;              // bytes
  bool fenced = false, late = false;            // since it was initialised; or not in time
  bool unfenced = false, was_unfenced = false;  // its phase, and the one before
  Thread* maker = nullptr;
  std::vector<std::function<void()>> landing;
  std::vector<Thread*> waiting;
};

/// Of one block.
class Async : public Kept {
 public:
  static Async& current() {
    auto& kept = kept_by_block();
    if (!kept) kept = std::make_shared<Async>(*host::current().block);
    return static_cast<Async&>(*kept);
  }

  explicit Async(const Block& block)
      : block_(block), known_(block.shared_bytes), boxed_(block.shared_bytes / kUnit + 1) {}

  void init(void* address, unsigned arrivals) {
    Barrier& barrier = barriers_[address];
    if (barrier.maker != nullptr) fail("a barrier is initialised twice");
    if (arrivals == 0) fail("a barrier that nobody arrives at");
    barrier.arrivals = barrier.pending = arrivals;
    barrier.maker = &host::current();
  }

  void arrive(void* address) {
    may_switch();
    Barrier& barrier = open_phase(address);
    if (barrier.pending == 0) fail("more threads arrive than the barrier expects");
    --barrier.pending;
    barrier.unfenced |= host::current().unfenced;
    complete_if_awaited(barrier);
  }

  void expect(void* address, size_t bytes) { open_phase(address).expected += bytes; }

  /// So many bytes that will be at `to` once `land` was called.
  void copy_box(void* address, unsigned char* to, size_t bytes, std::function<void()> land) {
    Barrier& barrier = open_phase(address);
    if (!barrier.fenced || barrier.late)
      fail("a barrier counts bytes, but its initialisation was not fenced");
    ++boxes_begun;
    std::memset(to, 0xff, bytes);
    box(to, bytes);
    barrier.coming += bytes;
    barrier.landing.push_back([=] {
      land();
      box(to, bytes);
    });
    complete_if_awaited(barrier);
  }

  /// The open copies of this thread become the barrier's.
  void await_copies(void* address) {
    Barrier& barrier = open_phase(address);
    for (const Copy& copy : take_copies()) {
      barrier.landing.push_back([this, copy] {
        copy.land();
        changed(copy.to, copy.bytes);
      });
      barrier.unfenced = true;
    }
  }

  void wait(void* address, unsigned parity) {
    may_switch();
    Thread& thread = host::current();
    Barrier& barrier = at(address);
    if (barrier.parity == parity) {
      if (can_complete(barrier)) {
        complete(barrier);
      } else {
        barrier.waiting.push_back(&thread);
        sleep();
      }
    }
    thread.unfenced |= barrier.was_unfenced;
  }

  void fence() {
    Thread& thread = host::current();
    thread.unfenced = false;
    for (auto& [address, barrier] : barriers_) barrier.fenced |= barrier.maker == &thread;
  }

  void met(const std::vector<Thread*>& threads) override {
    bool unfenced = false;
    for (const Thread* thread : threads) unfenced |= thread->unfenced;
    for (size_t at = 0; at < block_.shared_bytes; at += kUnit) {
      const size_t size = std::min(kUnit, block_.shared_bytes - at);
      if (!boxed_[at / kUnit] || !std::memcmp(&known_[at], block_.shared + at, size)) continue;
      unfenced = true;
      std::memcpy(&known_[at], block_.shared + at, size);
    }
    for (Thread* thread : threads) thread->unfenced = unfenced;
    for (auto& [address, barrier] : barriers_) {
      const bool maker = std::find(threads.begin(), threads.end(), barrier.maker) != threads.end();
      barrier.late |= maker && !barrier.fenced;
    }
  }

  void changed(const void* to, size_t bytes) override {
    const size_t at = static_cast<size_t>(static_cast<const unsigned char*>(to) - block_.shared);
    std::memcpy(&known_[at], to, bytes);
  }

  void end() override {
    for (const auto& [address, barrier] : barriers_) {
      if (!barrier.landing.empty()) fail("a block ends before its copies arrived");
      if (barrier.pending != 0 && barrier.pending != barrier.arrivals) {
        fail("a block ends when only some have arrived at a barrier");
      }
    }
  }

 private:
  static constexpr size_t kUnit = 16;

  Barrier& at(void* address) {
    const auto found = barriers_.find(address);
    if (found == barriers_.end()) fail("a barrier that is not initialised");
    return found->second;
  }

  /// The barrier in the phase that is not complete yet, though nobody may have waited.
  Barrier& open_phase(void* address) {
    Barrier& barrier = at(address);
    if (can_complete(barrier)) complete(barrier);
    return barrier;
  }

  static bool can_complete(const Barrier& barrier) {
    if (barrier.pending == 0 && barrier.coming > barrier.expected) {
      fail("more bytes come than the barrier expects");
    }
    return barrier.pending == 0 && barrier.coming == barrier.expected;
  }

  static void complete(Barrier& barrier) {
    for (const auto& land : barrier.landing) land();
    barrier.landing.clear();
    barrier.pending = barrier.arrivals;
    barrier.parity ^= 1;
    barrier.expected = barrier.coming = 0;
    barrier.was_unfenced = std::exchange(barrier.unfenced, false);
    for (Thread* thread : barrier.waiting) wake(*thread);
    barrier.waiting.clear();
  }

  static void complete_if_awaited(Barrier& barrier) {
    if (can_complete(barrier) && !barrier.waiting.empty()) complete(barrier);
  }

  void box(const unsigned char* to, size_t bytes) {
    changed(to, bytes);
    const size_t at = static_cast<size_t>(to - block_.shared);
    for (size_t i = at; i < at + bytes; i += kUnit) boxed_[i / kUnit] = true;
  }

  const Block& block_;
  std::map<void*, Barrier> barriers_;
  std::vector<unsigned char> known_;  // shared memory, where boxes are copied to
  std::vector<bool> boxed_;
};

}  // namespace host
