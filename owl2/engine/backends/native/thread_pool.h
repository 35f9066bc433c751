// Parallel work with barriers.
//
// A thread at a barrier polls for a while before it sleeps: a decode step has about a hundred
// barriers, and waking a thread takes longer than a small matrix product. OpenMP's own barrier
// sleeps immediately if the process has more OpenMP threads than cores.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace {

struct Range {
  int64_t from, to;
};

// One thread of a parallel region.
class Worker {
 public:
  struct Barrier {
    std::atomic<int> arrived{0}, generation{0};
  };

  Worker(Barrier& barrier, int index, int size)
      : barrier_(barrier), index_(index), size_(size) {}

  // This thread's part of 0 … n, in multiples of `step`.
  Range share(int64_t n, int64_t step) const {
    const int64_t num_steps = (n + step - 1) / step;
    return {std::min(n, num_steps * index_ / size_ * step),
            std::min(n, num_steps * (index_ + 1) / size_ * step)};
  }

  // Calls `work` with small parts of 0 … n, which alternate among the threads: later parts may
  // take longer.
  template <class Work>
  void for_each_part(int64_t n, const Work& work) const {
    const int64_t step = std::max<int64_t>(1, n / (8 * size_));
    for (int64_t i = index_ * step; i < n; i += size_ * step) work(i, std::min(n, i + step));
  }

  // Waits for all threads.
  void wait() {
    constexpr int MAX_POLLS = 1 << 12;  // about 50 us; the other threads may need this core
    const int now = barrier_.generation.load(std::memory_order_relaxed);
    if (barrier_.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      barrier_.arrived.store(0, std::memory_order_relaxed);
      barrier_.generation.store(now + 1, std::memory_order_release);
      barrier_.generation.notify_all();
      return;
    }
    for (int polls = 0; barrier_.generation.load(std::memory_order_acquire) == now; polls++) {
      if (polls > MAX_POLLS) barrier_.generation.wait(now, std::memory_order_acquire);
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }

 private:
  Barrier& barrier_;
  int index_, size_;
};

// Calls `work` with a Worker in each of `threads` threads.
template <class Work>
void parallel(int threads, const Work& work) {
  Worker::Barrier barrier;
#pragma omp parallel num_threads(threads)
  work(Worker(barrier, omp_get_thread_num(), omp_get_num_threads()));
}
}  // namespace
