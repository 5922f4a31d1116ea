// Matrix products with a prepared right operand: binary, of 16-bit integers, of floats. One loop for all three.
//
// Left operand: rows of 32-bit elements. Right operand: panels of 32 columns, each [elements][32], zeros where columns are missing.
// An element is 32 bits of a binary product, a pair of 16-bit integers, or a float.
#pragma once
#include "simd.h"

namespace LOWBIT_ISA {

constexpr int columns = 2 * lanes;  // of a panel

#if defined(LOWBIT_AVX512)
constexpr int rows_at_once = 12, vectors_at_once = 2, elements_at_once = 1 << 30;
INLINE Ints widened(Ints x) { return x; }
#else
constexpr int rows_at_once = 4, vectors_at_once = 1, elements_at_once = 31;  // 31 * 8 ones fit into a byte
INLINE Ints widened(Ints x) {
    x = (x & broadcast(0x00ff00ff)) + ((x >> 8) & broadcast(0x00ff00ff));
    return (x + (x >> 16)) & broadcast(0xffff);
}
#endif

// What one element adds, how many may be added before `widened`.
struct Mismatches {
    typedef Ints Sum;
    static constexpr long limit = elements_at_once;
    INLINE Ints add(Ints a, Ints b, Ints sum) {
#if defined(LOWBIT_AVX512)
        return sum + ones(a ^ b);
#else
        EACH sum.part[i] = (IntPart)((BytePart)sum.part[i] + (BytePart)ones(a ^ b).part[i]);
        return sum;
#endif
    }
    INLINE Ints finished(Ints sum) { return widened(sum); }
};
struct Pairs {
    typedef Ints Sum;
    static constexpr long limit = 1L << 30;
    INLINE Ints add(Ints a, Ints b, Ints sum) { return multiply_pairs(a, b, sum); }
    INLINE Ints finished(Ints sum) { return sum; }
};
struct Reals {
    typedef Floats Sum;
    static constexpr long limit = 1L << 30;
    INLINE Floats add(Ints a, Ints b, Floats sum) { return multiply_add(as_floats(a), as_floats(b), sum); }
    INLINE Floats finished(Floats sum) { return sum; }
};

// Sums of `rows` rows and one panel over at most `limit` elements, to `tile` with rows of `pitch`; added to it where there is `more`.
template <class Kind, int rows, bool more>
static __attribute__((noinline)) void block(const int32_t* left, long stride, const int32_t* panel, long elements, int32_t* tile, long pitch) {
    typedef typename Kind::Sum Sum;
    for (int half = 0; half < 2; half += vectors_at_once, panel += lanes, tile += lanes) {
        Sum sums[rows][vectors_at_once] = {};
        for (long e = 0; e < elements; e++) {
            Ints right[vectors_at_once];
            UNROLL for (int v = 0; v < vectors_at_once; v++) right[v] = load(panel + e * columns + v * lanes);
            UNROLL for (int r = 0; r < rows; r++) {
                const Ints a = broadcast(left[r * stride + e]);
                UNROLL for (int v = 0; v < vectors_at_once; v++) sums[r][v] = Kind::add(a, right[v], sums[r][v]);
            }
        }
        UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vectors_at_once; v++) {
            int32_t* to = tile + r * pitch + v * lanes;
            const Sum found = Kind::finished(sums[r][v]);
            store(to, more ? load_as<Sum>(to) + found : found);
        }
    }
}

// The same over any number of elements.
template <class Kind, int rows>
INLINE void block(const int32_t* left, long stride, const int32_t* panel, long elements, int32_t* tile, long pitch) {
    const long at_once = elements < Kind::limit ? elements : Kind::limit;
    block<Kind, rows, false>(left, stride, panel, at_once, tile, pitch);
    for (long e = at_once; e < elements; e += Kind::limit)
        block<Kind, rows, true>(left + e, stride, panel + e * columns, elements - e < Kind::limit ? elements - e : Kind::limit, tile, pitch);
}

// The same for any number of rows up to `rows_at_once`.
template <class Kind>
INLINE void blocks(const int32_t* left, long stride, long rows, const int32_t* panel, long elements, int32_t* tile, long pitch) {
    if (rows == rows_at_once) return block<Kind, rows_at_once>(left, stride, panel, elements, tile, pitch);
    long r = 0;
    if constexpr (rows_at_once > 4)
        for (; r + 4 <= rows; r += 4) block<Kind, 4>(left + r * stride, stride, panel, elements, tile + r * pitch, pitch);
    for (; r < rows; r++) block<Kind, 1>(left + r * stride, stride, panel, elements, tile + r * pitch, pitch);
}

// Calls finish(row, column, count, sums) for each 16 columns of rows begin to end.
template <class Kind, class Finish>
INLINE void product(const int32_t* left, const int32_t* right, long begin, long end, long width, long elements, Finish finish) {
    alignas(64) int32_t tile[rows_at_once * columns];
    for (long column = 0; column < width; column += columns, right += elements * columns)
        for (long row = begin; row < end; row += rows_at_once) {
            const long rows = end - row < rows_at_once ? end - row : rows_at_once;
            blocks<Kind>(left + row * elements, elements, rows, right, elements, tile, columns);
            for (long r = 0; r < rows; r++)
                sixteens(width - column < columns ? width - column : columns, [&](long at, long count) {
                    finish(row + r, column + at, count, load_as<typename Kind::Sum>(tile + r * columns + at));
                });
        }
}

}  // namespace LOWBIT_ISA
