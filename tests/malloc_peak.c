// Counts the heap of a process, for LD_PRELOAD: tensors, and the scratch memory of C++ operators
// and of LAPACK alike. Needs glibc.
#include <errno.h>
#include <malloc.h>
#include <stddef.h>

extern void* __libc_malloc(size_t);
extern void __libc_free(void*);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);

static long alive, most;

static void count(long bytes) {
  const long now = __atomic_add_fetch(&alive, bytes, __ATOMIC_RELAXED);
  long seen = __atomic_load_n(&most, __ATOMIC_RELAXED);
  while (now > seen &&
         !__atomic_compare_exchange_n(&most, &seen, now, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

static void* taken(void* data) {
  if (data) count((long)malloc_usable_size(data));
  return data;
}

static void given_back(void* data) {
  if (data) count(-(long)malloc_usable_size(data));
}

void* malloc(size_t size) { return taken(__libc_malloc(size)); }
void* calloc(size_t number, size_t size) { return taken(__libc_calloc(number, size)); }
void* memalign(size_t line, size_t size) { return taken(__libc_memalign(line, size)); }
void* aligned_alloc(size_t line, size_t size) { return taken(__libc_memalign(line, size)); }

void free(void* data) {
  given_back(data);
  __libc_free(data);
}

void* realloc(void* data, size_t size) {
  given_back(data);
  void* const moved = __libc_realloc(data, size);
  if (!moved && size) taken(data);
  return taken(moved);
}

int posix_memalign(void** out, size_t line, size_t size) {
  void* const data = taken(__libc_memalign(line, size));
  if (!data) return ENOMEM;
  *out = data;
  return 0;
}

// The bytes that are alive become the most so far, and are returned.
long malloc_peak_start(void) {
  most = alive;
  return alive;
}
long malloc_peak(void) { return most; }
