#pragma once

#include <cstdint>
#include <type_traits>

namespace saffron::cpu {

/// Runs `work(context, i, worker)` for every `i < count` on at most `threads` threads, numbered by
/// `worker < threads`, and returns when all are done. Each `i` goes to whichever thread is free, so
/// results must not depend on `worker`. Rethrows the first exception.
void parallel_for(int64_t count, int threads, void (*work)(void*, int64_t, int), void* context);

template <class F>
void parallel_for(int64_t count, int threads, F&& work) {
  using Work = std::remove_reference_t<F>;
  parallel_for(
      count, threads,
      [](void* context, int64_t i, int worker) { (*static_cast<Work*>(context))(i, worker); },
      &work);
}

/// At least `size` bytes, aligned to a cache line, that stay with the calling thread and are reused
/// by its next call: fresh memory would cost a page fault per 4 KiB in every op.
char* scratch(int64_t size);

}  // namespace saffron::cpu
