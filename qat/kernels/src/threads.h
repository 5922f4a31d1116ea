// Threads, one unless `lowbit_set_threads` says otherwise, and memory that a thread keeps between calls.
#pragma once
#include <cstddef>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace lowbit {

// Calls work(context, begin, end) for ranges that cover 0 to count, each of a multiple of `grain` but the last.
void divide(long count, long grain, void (*work)(void*, long, long), void* context);

template <class Function>
void parallel(long count, long grain, Function f) {
    divide(count, grain, [](void* g, long begin, long end) { (*static_cast<Function*>(g))(begin, end); }, &f);
}

// What a thread uses memory for; a purpose has one block, which its next use takes over.
enum Purpose { LEFT_BYTES, RIGHT_BYTES, SUMS, QUERIES, KEYS, VALUES, TURNED, MAPS, COUNTS, ROW, NARROW_BITS, WIDE_BITS, MOVED, VECTORS, NARROW_FLOATS, WIDE_FLOATS, PURPOSES };
void* scratch(Purpose purpose, size_t bytes);

}  // namespace lowbit
