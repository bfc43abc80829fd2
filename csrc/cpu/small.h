// Products of matrices so small that packing them into panels costs more than it saves, and the
// Cholesky factorisation of small systems: raw pointers, strides in elements, no torch headers.
#pragma once
#include <cstdint>

namespace krrst::cpu {

// out(i, j) = sum_k a(i, k) b(k, j); x(i, j) is x[i * x_row + j * x_column].
template <typename T>
struct Product {
  int64_t rows, depth, columns;
  const T* a;
  int64_t a_row, a_column;
  const T* b;
  int64_t b_row, b_column;
  T* out;
  int64_t out_row, out_column;
  // Where the next product of this shape begins to read what this one reads from memory (a in
  // `dot`, b in `outer`): it is fetched meanwhile. Any readable address.
  const T* next;
};

template <typename T>
struct Small {
  int64_t lanes;  // values of a vector
  int64_t rows;   // most rows of a tile of `dot`

  // By dot products of rows: a_column = b_row = 1, depth >= lanes.
  void (*dot)(const Product<T>& p);

  // By outer products, row by row of out: b_column = out_column = 1, columns >= lanes.
  void (*outer)(const Product<T>& p);

  // out[j * out_row + i] = x[i * x_row + j].
  void (*transpose)(int64_t rows, int64_t columns, const T* x, int64_t x_row, T* out,
                    int64_t out_row);
};

// Systems in float64, whose rows are padded to a multiple of `lanes`.
struct Triangular {
  int64_t lanes;

  // u [m][stride] holds the upper triangle of a symmetric matrix and becomes the U of U^T U; what
  // is then below the diagonal is not defined. Returns 0, or the number, from 1, of the first pivot
  // that is not a positive, finite number.
  int32_t (*factor)(int64_t m, double* u, int64_t stride);

  // x [m][stride] becomes (L L^T)^-1 x, where L(i, k) = l[i * l_row + k * l_column] and
  // inverse[i] = 1 / L(i, i).
  void (*solve)(int64_t m, const double* l, int64_t l_row, int64_t l_column, const double* inverse,
                double* x, int64_t stride);
};

template <typename T>
const Small<T>& small();
const Triangular& triangular();

}  // namespace krrst::cpu
