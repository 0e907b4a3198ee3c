#pragma once

// Runs a kernel on the CPU: one fiber a thread, all of them in one thread of the operating system.
//
// A fiber runs until it waits (a barrier, a warp collective) or ends; then the scheduler picks
// another. SAFFRON_CUDA_HOST_SEED=0, the default, picks in order and runs one block after the
// other. Any other seed keeps up to four blocks under way and changes fibers before atomics and
// fences too. Odd seeds pick at random; even ones give every fiber a random rank and run the
// highest that is ready, so that some fall far behind. A kernel that is free of races gives the
// same bits under all.
//
// Shared memory, and the target of an asynchronous copy until it is waited for, hold bytes of ones:
// NaN as a float, -1 as an integer.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace host {

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct Block;

/// What a thread may know of itself.
struct Thread {
  dim3 thread_index;
  unsigned lane = 0;
  Block* block = nullptr;
  bool unfenced = false;          // it knows of writes that the other proxy may not see: async.h
  bool registers_fenced = false;  // for products of a warpgroup
};

struct Block {
  dim3 index, grid, threads;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
};

/// An asynchronous copy to shared memory of bytes, or of zeros.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  bool read;

  void land() const;
};

/// What the twins of some operations keep for a warp or a block.
struct Kept {
  virtual ~Kept() = default;
  /// These threads have met at a barrier.
  virtual void met(const std::vector<Thread*>&) {}
  /// Bytes in shared memory are not what they were, for a reason other than a store.
  virtual void changed(const void*, size_t) {}
  /// All threads of the block have ended; whatever is still open is to `fail`.
  virtual void end() {}
};

/// The thread that is running.
Thread& current();

/// Runs `body` in every thread of the grid. `name` holds that of the kernel. Throws
/// std::runtime_error for what `fail` says, and where threads wait for each other for ever.
void run(const char* name, dim3 grid, unsigned threads, size_t shared_bytes,
         const std::function<void()>& body);

/// Ends the launch with an error. Does not return.
[[noreturn]] void fail(const char* what);

/// A point where another thread may take over.
void may_switch();

/// The running thread has changed what lies at `address` by an atomic operation. If that is not its
/// block's own memory, in some orders the rest of its block falls behind from here: what they had
/// to have done before, and have not, then shows in the blocks that heard of it.
void told(const void* address);

/// A point where another thread takes over: for loops that wait for another block.
void yield();

void block_barrier();

/// A barrier that also counts for how many threads the predicate holds.
int block_count(bool predicate);

/// Waits for all lanes of `mask`, each of which gives a pointer; the last to come runs
/// `work(pointers by lane, mask)`, and all go on. `name` tells collectives apart: lanes must not
/// meet in different ones.
void collective(unsigned mask, void* own, const char* name, void (*work)(void**, unsigned));

/// A barrier of the first `threads` threads to come to it, by number; numbers from 1.
void some_barrier(unsigned number, unsigned threads);

/// Leaves the running thread until another wakes it.
void sleep();
void wake(Thread& thread);

/// Empty at first.
std::shared_ptr<Kept>& kept_by_block();
std::shared_ptr<Kept>& kept_by_warp(unsigned warp);

/// How often, in all launches: bulk copies of a box were begun, copies of 16 bytes, atomics done,
/// tensors described for boxes.
extern size_t boxes_begun, copies_begun, atomics_done, tensors_described;

// --- asynchronous copies of the current thread ---

void copy(void* to, const void* from, size_t bytes, bool read);
void copy_commit();
void copy_wait(size_t pending);

/// Those since the last commit, which are no longer the thread's.
std::vector<Copy> take_copies();

}  // namespace host

extern "C" {
/// A line for every kind of launch so far: name, threads of a block, bytes of shared memory,
/// separated by tabs.
const char* saffron_launches();
/// From here on launches are listed again.
void saffron_forget_launches();
/// How many launches there were.
unsigned saffron_launch_count();
/// `boxes_begun` and so on.
size_t saffron_boxes();
size_t saffron_copies();
size_t saffron_atomics();
size_t saffron_described();
}
