// Threads for the inner loops without torch's headers: ops.cpp passes torch's own pool.
#pragma once
#include <cstdint>
#include <functional>

namespace krrst::cpu {

// Runs body(first, last) over a partition of [0, count), on as many threads as pay.
using Parallel = std::function<void(int64_t count,
                                    const std::function<void(int64_t first, int64_t last)>& body)>;

// Runs everything on the calling thread.
inline const Parallel& this_thread() {
  static const Parallel alone = [](int64_t count,
                                   const std::function<void(int64_t, int64_t)>& body) {
    if (count > 0) body(0, count);
  };
  return alone;
}

// Returns `threads`, or one thread if waking the others takes longer than so many multiplications.
inline const Parallel& worth(int64_t multiplications, const Parallel& threads) {
  return multiplications < (1 << 20) ? this_thread() : threads;
}

}  // namespace krrst::cpu
