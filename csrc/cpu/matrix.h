// Matrices that lie anywhere in memory, one after another.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace krrst::cpu {

// Entry (i, j) is data[i * row + j * column].
template <typename T>
struct Matrix {
  T* data;
  int64_t row, column;

  Matrix from(int64_t i, int64_t j) const { return {data + i * row + j * column, row, column}; }
  Matrix transposed() const { return {data, column, row}; }
};

// One matrix after another, `step` apart.
template <typename T>
struct Matrices {
  T* data;
  int64_t step, row, column;

  Matrix<T> operator[](int64_t n) const { return {data + n * step, row, column}; }
};

// Uninitialised memory of a thread, on a cache line; null for none.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(count > 0
                  ? static_cast<T*>(::operator new(sizeof(T) * static_cast<size_t>(count), kLine))
                  : nullptr) {}
  T* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(T* data) const { ::operator delete(data, kLine); }
  };
  std::unique_ptr<T, Free> data_;
};

// The rows x columns part of x into that of out, in the order in which x lies.
template <typename S, typename T>
void copy(const Matrix<S>& x, int64_t rows, int64_t columns, const Matrix<T>& out) {
  if (x.row < x.column) return copy(x.transposed(), columns, rows, out.transposed());
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      out.data[i * out.row + j * out.column] = static_cast<T>(x.data[i * x.row + j * x.column]);
}

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace krrst::cpu
