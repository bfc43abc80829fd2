// Glue between torch and the CPU kernels, on torch's stable ABI: takes pointers, allocates, lends
// the thread pool.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <functional>
#include <initializer_list>
#include <optional>
#include <utility>

#include "../check.h"
#include "matrix.h"

namespace krrst::glue {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rethrows the first exception of a parallel region, which no exception may leave.
inline void on_torch_threads(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  std::atomic<bool> failed{false};
  torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
    try {
      body(first, last);
    } catch (...) {
      failed = true;
    }
  });
  KRRST_CHECK(!failed, "krrst_fast: a CPU kernel ran out of memory");
}

inline int32_t dtype_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::Long:
      return aoti_torch_dtype_int64();
    case ScalarType::Int:
      return aoti_torch_dtype_int32();
    default:
      KRRST_CHECK(false, "krrst_fast: the tensors must be float32 or float64");
  }
}

// An uninitialised tensor on the CPU, stored by rows, or the last two dimensions by columns. By the
// function itself: `torch::stable::new_empty` looks its operator up by name, which costs as much as
// a small product. malloc maps large tensors anew each time, and the system zeroes each page at the
// first write: with pages of 2 MB that is four times faster than with 4 KB.
inline Tensor fresh(ScalarType dtype, std::initializer_list<int64_t> shape,
                    bool by_columns = false) {
  constexpr size_t kLarge = 32 << 20, kPage = 2 << 20;
  constexpr size_t kMost = 4;
  KRRST_CHECK(shape.size() <= kMost, "krrst_fast: a tensor has too many dimensions");
  const auto dims = static_cast<int64_t>(shape.size());
  int64_t strides[kMost], count = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    strides[i] = count;
    count *= shape.begin()[i] > 0 ? shape.begin()[i] : 1;
  }
  if (by_columns) {
    strides[dims - 2] = 1;
    strides[dims - 1] = shape.begin()[dims - 2] > 0 ? shape.begin()[dims - 2] : 1;
  }
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, shape.begin(), strides, dtype_of(dtype),
                                                  aoti_torch_device_type_cpu(), 0, &made));
  Tensor out(made);
#if defined(__linux__)
  const size_t bytes = static_cast<size_t>(out.numel()) * out.element_size();
  if (bytes >= kLarge) {
    const auto first = (reinterpret_cast<uintptr_t>(out.data_ptr()) + kPage - 1) / kPage * kPage;
    const auto last = (reinterpret_cast<uintptr_t>(out.data_ptr()) + bytes) / kPage * kPage;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: may fail
  }
#endif
  return out;
}

inline Tensor fresh(const Tensor& x, std::initializer_list<int64_t> shape,
                    bool by_columns = false) {
  return fresh(x.scalar_type(), shape, by_columns);
}

template <typename F>
void for_real_dtype(const char* op, const Tensor& x, F&& body) {
  if (x.scalar_type() == ScalarType::Float) return body(float{});
  KRRST_CHECK(x.scalar_type() == ScalarType::Double, op,
              ": the tensors must be float32 or float64");
  body(double{});
}

// Entries [.., i, j] of a 2-D or 3-D tensor.
template <typename T>
cpu::Matrices<const T> matrices(const Tensor& x) {
  const int64_t d = x.dim();
  return {static_cast<const T*>(x.data_ptr()), d == 3 ? x.stride(0) : 0, x.stride(d - 2),
          x.stride(d - 1)};
}

}  // namespace krrst::glue
