// How the kernels ask for threads without knowing torch: the glue passes torch's own pool.
#pragma once
#include <cstdint>
#include <functional>

namespace krrst::cpu {

// Runs body(first, last) over a partition of [0, count), on as many threads as pay.
using Parallel = std::function<void(int64_t count,
                                    const std::function<void(int64_t first, int64_t last)>& body)>;

}  // namespace krrst::cpu
