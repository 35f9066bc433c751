// Threads that compute something parallel: each its share, with points at which all wait.
//
// A waiting thread looks again and again for a while before it goes to sleep: a decode step has a
// hundred such points, and to be woken takes longer than a small product. OpenMP's own barrier
// sleeps at once as soon as a process has more of OpenMP's threads than cores, and it has as many
// for every thread of Python's that ever computed something.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace {

struct Range {
  int64_t from, to;
};

// One of the threads.
class Worker {
 public:
  struct Barrier {
    std::atomic<int> arrived{0}, held{0};
  };

  Worker(Barrier& barrier, int number, int size)
      : barrier_(barrier), number_(number), size_(size) {}

  // This thread's part of 0 … n, of whole `step`s where they go.
  Range share(int64_t n, int64_t step) const {
    const int64_t decoder_layers = (n + step - 1) / step;
    return {std::min(n, decoder_layers * number_ / size_ * step),
            std::min(n, decoder_layers * (number_ + 1) / size_ * step)};
  }

  // Calls `work` with this thread's parts of 0 … n: small ones in turn, where later ones take
  // longer.
  template <class Work>
  void dynamic_share(int64_t n, const Work& work) const {
    const int64_t step = std::max<int64_t>(1, n / (8 * size_));
    for (int64_t i = number_ * step; i < n; i += size_ * step) work(i, std::min(n, i + step));
  }

  // Until all are here.
  void wait() {
    constexpr int PATIENCE = 1 << 12;  // some 50 us; then who is waited for may need the core
    const int now = barrier_.held.load(std::memory_order_relaxed);
    if (barrier_.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      barrier_.arrived.store(0, std::memory_order_relaxed);
      barrier_.held.store(now + 1, std::memory_order_release);
      barrier_.held.notify_all();
      return;
    }
    for (int looks = 0; barrier_.held.load(std::memory_order_acquire) == now; looks++) {
      if (looks > PATIENCE) barrier_.held.wait(now, std::memory_order_acquire);
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }

 private:
  Barrier& barrier_;
  int number_, size_;
};

// Calls `work` with a Worker in each of so many threads.
template <class Work>
void parallel(int threads, const Work& work) {
  Worker::Barrier barrier;
#pragma omp parallel num_threads(threads)
  work(Worker(barrier, omp_get_thread_num(), omp_get_num_threads()));
}
}  // namespace
