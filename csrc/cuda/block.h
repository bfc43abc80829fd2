#pragma once
// A block of GPU threads, written so that the same source also compiles as plain C++, where a loop
// takes the place of the threads: index logic is then tested on a machine without a GPU
// (tests/cuda_model.cpp). Every step of a block is a body run for each thread between two barriers;
// what a thread keeps from one step to the next is Private, what the threads of a block exchange is
// in a shared struct.
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define KRRST_DEVICE __device__ __forceinline__
#define KRRST_ANYWHERE __host__ __device__ inline
#define KRRST_UNROLL _Pragma("unroll")
#define KRRST_TEXT(x) #x
#define KRRST_UNROLL_BY(count) _Pragma(KRRST_TEXT(unroll(count)))
#else
#define KRRST_DEVICE inline
#define KRRST_ANYWHERE inline
#define KRRST_UNROLL
#define KRRST_UNROLL_BY(count)
#endif

namespace krrst::cuda {

#if defined(__CUDACC__)

struct Block {
  // Runs body(thread) on all threads, then a barrier.
  template <typename F>
  KRRST_DEVICE void each(F&& body) const {
    body(static_cast<int>(threadIdx.x));
    __syncthreads();
  }

  // Without a barrier, for a body that touches nothing another thread of the block writes.
  template <typename F>
  KRRST_DEVICE void alone(F&& body) const {
    body(static_cast<int>(threadIdx.x));
  }
};

template <typename T, int kCount, int kThreads>
struct Private {
  T values[kCount];
  KRRST_DEVICE T* operator[](int) { return values; }
};

#else

// The order in which the threads run must not matter: a test tries several.
struct Block {
  const int* order;
  int threads;

  template <typename F>
  void each(F&& body) const {
    for (int i = 0; i < threads; ++i) body(order[i]);
  }

  template <typename F>
  void alone(F&& body) const {
    each(body);
  }
};

template <typename T, int kCount, int kThreads>
struct Private {
  T values[kThreads][kCount];
  T* operator[](int thread) { return values[thread]; }
};

#endif

// Four neighbours, moved as one vector.
template <typename T>
struct alignas(16) Four {
  T values[4];
  KRRST_DEVICE T operator[](int i) const { return values[i]; }
};

template <typename T>
KRRST_DEVICE Four<T> load_four(const T* source) {
  return *reinterpret_cast<const Four<T>*>(source);
}

template <typename T>
KRRST_DEVICE T inverse_sqrt(T x) {
#if defined(__CUDA_ARCH__)
  // One step of Newton: the instruction alone is wrong by two units in the last place.
  const T guess = rsqrt(x);
  return guess + T(0.5) * guess * (T(1) - x * guess * guess);
#else
  return 1 / std::sqrt(x);
#endif
}

}  // namespace krrst::cuda
