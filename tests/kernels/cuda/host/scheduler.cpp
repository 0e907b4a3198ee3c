#include "scheduler.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

namespace host {
namespace {

constexpr size_t kStack = 256 * 1024;  // touched only as far as it is used
constexpr unsigned kBlocksUnderWay = 4;

struct Fiber : Thread {
  ucontext_t beginning;
  jmp_buf state;
  bool started = false, ended = false;
  unsigned rank = 0;
  std::unique_ptr<char[]> stack{new char[kStack]};
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

struct Warp {
  unsigned mask = 0, arrived = 0;
  const char* name = nullptr;
  void* given[32];
  Fiber* waiting[32];
  std::shared_ptr<Kept> kept;
};

struct RunningBlock : Block {
  std::vector<Fiber*> fibers;
  std::vector<Warp> warps;
  std::vector<Fiber*> at_barrier;
  std::map<unsigned, std::vector<Fiber*>> at_some_barrier;  // by number
  std::shared_ptr<Kept> kept;
  std::vector<unsigned char> memory;
  int counted = 0, count = 0;
  size_t alive = 0;
};

/// Everything about the launch under way; one at a time.
struct Scheduler {
  jmp_buf back;
  Fiber* running = nullptr;
  std::vector<Fiber*> ready;
  std::vector<std::unique_ptr<Fiber>> all;  // kept from launch to launch, for their stacks
  std::vector<Fiber*> idle;
  const std::function<void()>* body = nullptr;
  std::mt19937 random;
  bool shuffled = false, ranked = false;
  std::string error;
};

Scheduler scheduler;
std::mutex one_at_a_time;
std::set<std::string> launches;
unsigned launch_count = 0;

RunningBlock& block_of(Fiber& fiber) { return *static_cast<RunningBlock*>(fiber.block); }

/// Back to the scheduler, which goes on here when the fiber is picked again.
void leave(Fiber& fiber) {
  if (!_setjmp(fiber.state)) _longjmp(scheduler.back, 1);
}

void make_ready(Fiber* fiber) {
  fiber->rank = static_cast<unsigned>(scheduler.random());  // others fall behind from here
  scheduler.ready.push_back(fiber);
}

/// They have met, and go on.
void release(RunningBlock& block, std::vector<Fiber*>& fibers) {
  if (block.kept) block.kept->met(std::vector<Thread*>(fibers.begin(), fibers.end()));
  for (Fiber* fiber : fibers) make_ready(fiber);
  fibers.clear();
}

void release_barrier(RunningBlock& block) {
  block.count = block.counted;
  block.counted = 0;
  release(block, block.at_barrier);
}

void end_block(RunningBlock& block) {
  if (block.kept) block.kept->end();
  for (const Warp& warp : block.warps) {
    if (warp.kept) warp.kept->end();
  }
}

void begin_fiber() {
  (*scheduler.body)();
  Fiber& fiber = *scheduler.running;
  if (!fiber.open.empty() || !fiber.groups.empty()) fail("a thread ends before its copies arrived");
  fiber.ended = true;
  RunningBlock& block = block_of(fiber);
  --block.alive;
  if (!block.alive) end_block(block);
  if (block.alive && block.at_barrier.size() == block.alive) release_barrier(block);
  _longjmp(scheduler.back, 1);
}

/// Runs one fiber until it leaves. In a function of its own: nothing it holds is needed afterwards.
void resume(Fiber& fiber) {
  scheduler.running = &fiber;
  if (_setjmp(scheduler.back)) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  setcontext(&fiber.beginning);
}

Fiber* new_fiber() {
  if (scheduler.idle.empty()) {
    scheduler.all.push_back(std::make_unique<Fiber>());
    scheduler.idle.push_back(scheduler.all.back().get());
  }
  Fiber* fiber = scheduler.idle.back();
  scheduler.idle.pop_back();
  fiber->started = fiber->ended = false;
  fiber->unfenced = fiber->registers_fenced = false;
  fiber->open.clear();
  fiber->groups.clear();
  getcontext(&fiber->beginning);
  fiber->beginning.uc_stack.ss_sp = fiber->stack.get();
  fiber->beginning.uc_stack.ss_size = kStack;
  fiber->beginning.uc_link = nullptr;
  makecontext(&fiber->beginning, begin_fiber, 0);
  return fiber;
}

std::unique_ptr<RunningBlock> start_block(dim3 grid, unsigned threads, size_t shared_bytes,
                                          unsigned number) {
  auto block = std::make_unique<RunningBlock>();
  block->grid = grid;
  block->threads = dim3(threads);
  block->index = dim3(number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y);
  block->memory.assign(shared_bytes + 1024, 0xff);
  const auto address = reinterpret_cast<uintptr_t>(block->memory.data());
  block->shared = block->memory.data() + (1024 - address % 1024) % 1024;
  block->shared_bytes = shared_bytes;
  block->warps.resize((threads + 31) / 32);
  block->alive = threads;
  for (unsigned t = 0; t < threads; ++t) {
    Fiber* fiber = new_fiber();
    fiber->thread_index = dim3(t, 0, 0);
    fiber->lane = t % 32;
    fiber->block = block.get();
    fiber->rank = static_cast<unsigned>(scheduler.random());
    block->fibers.push_back(fiber);
  }
  // The last of the list runs first.
  scheduler.ready.insert(scheduler.ready.end(), block->fibers.rbegin(), block->fibers.rend());
  return block;
}

Fiber* pick() {
  auto& ready = scheduler.ready;
  if (scheduler.ranked) {
    const auto lower = [](Fiber* a, Fiber* b) { return a->rank < b->rank; };
    std::swap(*std::max_element(ready.begin(), ready.end(), lower), ready.back());
  } else if (scheduler.shuffled) {
    std::swap(ready[scheduler.random() % ready.size()], ready.back());
  }
  Fiber* fiber = ready.back();
  ready.pop_back();
  return fiber;
}

void run_all(dim3 grid, unsigned threads, size_t shared_bytes) {
  std::vector<unsigned> order(grid.x * grid.y * grid.z);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  if (scheduler.shuffled) std::shuffle(order.begin(), order.end(), scheduler.random);
  std::vector<std::unique_ptr<RunningBlock>> blocks;
  size_t next = 0;
  const size_t most = scheduler.shuffled ? 1 + scheduler.random() % kBlocksUnderWay : 1;
  while (next < order.size() || !blocks.empty()) {
    while (blocks.size() < most && next < order.size()) {
      blocks.push_back(start_block(grid, threads, shared_bytes, order[next++]));
    }
    if (scheduler.ready.empty()) {
      scheduler.error = "threads wait for others that do not come (barrier, warp collective)";
    } else {
      resume(*pick());
    }
    if (!scheduler.error.empty()) throw std::runtime_error(scheduler.error);
    if (!scheduler.running->ended) continue;
    for (auto& block : blocks) {
      if (block->alive) continue;
      scheduler.idle.insert(scheduler.idle.end(), block->fibers.begin(), block->fibers.end());
      block = std::move(blocks.back());
      blocks.pop_back();
      break;
    }
  }
}

}  // namespace

size_t boxes_begun = 0, copies_begun = 0, atomics_done = 0, tensors_described = 0;

Thread& current() { return *scheduler.running; }

void run(const char* name, dim3 grid, unsigned threads, size_t shared_bytes,
         const std::function<void()>& body) {
  const std::lock_guard<std::mutex> alone(one_at_a_time);
  launches.insert(std::string(name) + '\t' + std::to_string(threads) + '\t' +
                  std::to_string(shared_bytes) + '\n');
  ++launch_count;
  const char* given = std::getenv("SAFFRON_CUDA_HOST_SEED");
  const unsigned seed = given ? static_cast<unsigned>(std::strtoul(given, nullptr, 10)) : 0;
  scheduler.random.seed(seed);
  scheduler.shuffled = seed != 0;
  scheduler.ranked = seed != 0 && seed % 2 == 0;
  scheduler.body = &body;
  scheduler.ready.clear();
  scheduler.error.clear();
  scheduler.idle.clear();
  for (auto& fiber : scheduler.all) scheduler.idle.push_back(fiber.get());
  run_all(grid, threads, shared_bytes);
}

void fail(const char* what) {
  scheduler.error = what;
  _longjmp(scheduler.back, 1);
}

void yield() {
  Fiber& fiber = *scheduler.running;
  fiber.rank = static_cast<unsigned>(scheduler.random());
  scheduler.ready.insert(scheduler.ready.begin(), &fiber);
  leave(fiber);
}

void may_switch() {
  if (scheduler.shuffled && scheduler.random() % 2) yield();
}

void told(const void* address) {
  if (!scheduler.ranked || scheduler.random() % 2) return;
  RunningBlock& block = block_of(*scheduler.running);
  const auto* at = static_cast<const unsigned char*>(address);
  if (at >= block.memory.data() && at < block.memory.data() + block.memory.size()) return;
  for (Fiber* fiber : block.fibers) {
    if (fiber != scheduler.running) fiber->rank = 0;
  }
}

int block_count(bool predicate) {
  Fiber& fiber = *scheduler.running;
  RunningBlock& block = block_of(fiber);
  block.counted += predicate;
  block.at_barrier.push_back(&fiber);
  if (block.at_barrier.size() == block.alive) release_barrier(block);
  leave(fiber);
  return block.count;  // the next barrier cannot be complete before this thread is there
}

void block_barrier() { block_count(false); }

void some_barrier(unsigned number, unsigned threads) {
  Fiber& fiber = *scheduler.running;
  RunningBlock& block = block_of(fiber);
  auto& waiting = block.at_some_barrier[number];
  waiting.push_back(&fiber);
  if (waiting.size() == threads) release(block, waiting);
  leave(fiber);
}

void sleep() { leave(*scheduler.running); }

void wake(Thread& thread) { make_ready(static_cast<Fiber*>(&thread)); }

std::shared_ptr<Kept>& kept_by_block() { return block_of(*scheduler.running).kept; }

std::shared_ptr<Kept>& kept_by_warp(unsigned warp) {
  return block_of(*scheduler.running).warps.at(warp).kept;
}

void collective(unsigned mask, void* own, const char* name, void (*work)(void**, unsigned)) {
  Fiber& fiber = *scheduler.running;
  Warp& warp = block_of(fiber).warps[fiber.thread_index.x / 32];
  if (!(mask >> fiber.lane & 1)) fail("a lane is not in the mask of its own collective");
  if (warp.arrived == 0) {
    warp.mask = mask;
    warp.name = name;
  } else if (warp.mask != mask || std::strcmp(warp.name, name) != 0) {
    fail("lanes of a warp meet in different collectives or under different masks");
  }
  warp.arrived |= 1u << fiber.lane;
  warp.given[fiber.lane] = own;
  warp.waiting[fiber.lane] = &fiber;
  if (warp.arrived == mask) {
    work(warp.given, mask);
    for (int i = 31; i >= 0; --i) {
      if (mask >> i & 1) scheduler.ready.push_back(warp.waiting[i]);
    }
    warp.arrived = 0;
  }
  leave(fiber);
}

void Copy::land() const {
  if (read) {
    std::memcpy(to, from, bytes);
  } else {
    std::memset(to, 0, bytes);
  }
}

void copy(void* to, const void* from, size_t bytes, bool read) {
  ++copies_begun;
  std::memset(to, 0xff, bytes);
  if (auto& kept = kept_by_block()) kept->changed(to, bytes);
  scheduler.running->open.push_back({to, from, bytes, read});
}

void copy_commit() {
  Fiber& fiber = *scheduler.running;
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

void copy_wait(size_t pending) {
  Fiber& fiber = *scheduler.running;
  while (fiber.groups.size() > pending) {
    for (const Copy& copy : fiber.groups.front()) {
      copy.land();
      if (auto& kept = kept_by_block()) kept->changed(copy.to, copy.bytes);
    }
    fiber.groups.pop_front();
  }
}

std::vector<Copy> take_copies() {
  std::vector<Copy> open;
  open.swap(scheduler.running->open);
  return open;
}

}  // namespace host

__attribute__((visibility("default"))) const char* saffron_launches() {
  static std::string all;
  all.clear();
  for (const auto& launch : host::launches) all += launch;
  return all.c_str();
}

__attribute__((visibility("default"))) void saffron_forget_launches() { host::launches.clear(); }

__attribute__((visibility("default"))) unsigned saffron_launch_count() {
  return host::launch_count;
}

__attribute__((visibility("default"))) size_t saffron_boxes() { return host::boxes_begun; }
__attribute__((visibility("default"))) size_t saffron_copies() { return host::copies_begun; }
__attribute__((visibility("default"))) size_t saffron_atomics() { return host::atomics_done; }
__attribute__((visibility("default"))) size_t saffron_described() {
  return host::tensors_described;
}
