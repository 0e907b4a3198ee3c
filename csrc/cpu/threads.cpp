#include "cpu/threads.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace saffron::cpu {
namespace {

/// The OpenMP runtime that PyTorch has loaded. A pool of our own would compete with its workers,
/// which go on spinning for a while after every op; linking to OpenMP could load a second runtime.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel find_openmp() {
#if defined(__linux__)
  for (const char* name : {"libgomp.so.1", "libiomp5.so", "libomp.so"}) {
    if (void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD)) {
      if (void* found = dlsym(library, "GOMP_parallel")) {
        return reinterpret_cast<GompParallel>(found);
      }
    }
  }
#endif
  return nullptr;
}

struct Job {
  int64_t count;
  void (*work)(void*, int64_t, int);
  void* context;
  std::atomic<int64_t> next{0};
  std::atomic<int> workers{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;

  Job(int64_t count, void (*work)(void*, int64_t, int), void* context)
      : count(count), work(work), context(context) {}

  static void run(void* self) {
    Job& job = *static_cast<Job*>(self);
    const int worker = job.workers.fetch_add(1, std::memory_order_relaxed);
    try {
      for (;;) {
        const int64_t i = job.next.fetch_add(1, std::memory_order_relaxed);
        if (i >= job.count) return;
        job.work(job.context, i, worker);
      }
    } catch (...) {
      job.next.store(job.count, std::memory_order_relaxed);
      if (!job.failed.exchange(true)) job.error = std::current_exception();
    }
  }
};

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};

}  // namespace

void parallel_for(int64_t count, int threads, void (*work)(void*, int64_t, int), void* context) {
  threads = static_cast<int>(std::min<int64_t>(threads, count));
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) work(context, i, 0);
    return;
  }
  Job job(count, work, context);
  // Looked up at each call until found: PyTorch may be imported later than this module.
  static std::atomic<GompParallel> openmp{nullptr};
  GompParallel parallel = openmp.load(std::memory_order_relaxed);
  if (parallel == nullptr) openmp.store(parallel = find_openmp(), std::memory_order_relaxed);
  if (parallel != nullptr) {
    parallel(&Job::run, &job, static_cast<unsigned>(threads), 0);
  } else {
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(&Job::run, &job);
    Job::run(&job);
    for (std::thread& other : others) other.join();
  }
  if (job.error) std::rethrow_exception(job.error);
}

char* scratch(int64_t size) {
  thread_local std::unique_ptr<char, Free> memory;
  thread_local int64_t held = 0;
  if (held < size) {
    constexpr int64_t line = 64;
    memory.reset();
    held = 0;
    size = (size + line - 1) / line * line;
    memory.reset(static_cast<char*>(std::aligned_alloc(line, static_cast<size_t>(size))));
    if (memory == nullptr) throw std::bad_alloc();
    held = size;
  }
  return memory.get();
}

}  // namespace saffron::cpu
