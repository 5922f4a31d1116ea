// Sixteen lanes of 32 bits on every instruction set, and what they do differently.
//
// A file of an instruction set names itself (LOWBIT_ISA), the bytes of one of its registers (LOWBIT_BYTES) and the level of its own
// instructions (LOWBIT_AVX512, LOWBIT_AVX2, LOWBIT_NEON or none), then includes `blocks.h`. Arithmetic on floats is written out, and the
// compiler may not contract it, so every instruction set gives the same bits.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "threads.h"

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define EACH UNROLL for (int i = 0; i < parts; i++)

namespace LOWBIT_ISA {

constexpr int lanes = 16, parts = 64 / LOWBIT_BYTES;
typedef float FloatPart __attribute__((vector_size(LOWBIT_BYTES)));
typedef int32_t IntPart __attribute__((vector_size(LOWBIT_BYTES)));
typedef uint32_t WordPart __attribute__((vector_size(LOWBIT_BYTES)));  // wraps around
typedef uint8_t BytePart __attribute__((vector_size(LOWBIT_BYTES)));

struct Floats {
    typedef float Loose __attribute__((vector_size(LOWBIT_BYTES), aligned(4), may_alias));  // a part anywhere in memory
    FloatPart part[parts];
};
struct Ints {
    typedef int32_t Loose __attribute__((vector_size(LOWBIT_BYTES), aligned(4), may_alias));
    IntPart part[parts];
};

// Sixteen sums in double precision.
struct Doubles {
    typedef double Part __attribute__((vector_size(LOWBIT_BYTES)));
    typedef float Half __attribute__((vector_size(LOWBIT_BYTES / 2), aligned(4), may_alias));
    Part part[2 * parts];
    INLINE_MEMBER void add(const float* x) {
        UNROLL for (int i = 0; i < 2 * parts; i++) part[i] += __builtin_convertvector(((const Half*)x)[i], Part);
    }
    INLINE_MEMBER double at(int i) const { return part[i / (lanes / 2 / parts)][i % (lanes / 2 / parts)]; }
};

#define OPERATOR(type, part_type, arithmetic, op) \
    INLINE type operator op(type a, type b) { \
        EACH a.part[i] = (part_type)((arithmetic)a.part[i] op (arithmetic)b.part[i]); \
        return a; \
    }
#define COMPARISON(type, op) \
    INLINE Ints operator op(type a, type b) { \
        Ints mask; \
        EACH mask.part[i] = (IntPart)(a.part[i] op b.part[i]); \
        return mask; \
    }
OPERATOR(Floats, FloatPart, FloatPart, +)
OPERATOR(Floats, FloatPart, FloatPart, -)
OPERATOR(Floats, FloatPart, FloatPart, *)
OPERATOR(Floats, FloatPart, FloatPart, /)
COMPARISON(Floats, >=)
COMPARISON(Floats, >)
OPERATOR(Ints, IntPart, WordPart, +)
OPERATOR(Ints, IntPart, WordPart, -)
OPERATOR(Ints, IntPart, WordPart, &)
OPERATOR(Ints, IntPart, WordPart, |)
OPERATOR(Ints, IntPart, WordPart, ^)
COMPARISON(Ints, >=)
COMPARISON(Ints, <=)
COMPARISON(Ints, <)

INLINE Ints operator>>(Ints a, int bits) {
    EACH a.part[i] = a.part[i] >> bits;
    return a;
}
INLINE Ints operator<<(Ints a, int bits) {
    EACH a.part[i] = (IntPart)((WordPart)a.part[i] << bits);
    return a;
}

INLINE Floats broadcast(float x) {
    Floats v;
    EACH v.part[i] = x - FloatPart{};
    return v;
}
INLINE Ints broadcast(int32_t x) {
    Ints v;
    EACH v.part[i] = x - IntPart{};
    return v;
}

template <class Vector>
INLINE Vector load_as(const void* from) {
    Vector v;
    EACH v.part[i] = ((const typename Vector::Loose*)from)[i];
    return v;
}
// The first n of 16 values, the others 0: nothing is read past them. n may be negative, which is none.
template <class Vector>
INLINE Vector load_as(const void* from, long n) {
    if (n >= lanes) return load_as<Vector>(from);
    int32_t present[lanes] = {};
    if (n > 0) std::memcpy(present, from, 4 * n);
    return load_as<Vector>(present);
}
INLINE Floats load(const float* from, long n = lanes) { return load_as<Floats>(from, n); }
INLINE Ints load(const int32_t* from, long n = lanes) { return load_as<Ints>(from, n); }

template <class Vector>
INLINE void store(void* to, Vector v, long n = lanes) {
    if (n >= lanes)
        EACH ((typename Vector::Loose*)to)[i] = v.part[i];
    else if (n > 0)
        std::memcpy(to, &v, 4 * n);
}

INLINE Ints as_ints(Floats a) {
    Ints v;
    EACH v.part[i] = (IntPart)a.part[i];
    return v;
}
INLINE Floats as_floats(Ints a) {
    Floats v;
    EACH v.part[i] = (FloatPart)a.part[i];
    return v;
}
INLINE Floats to_floats(Ints a) {
    Floats v;
    EACH v.part[i] = __builtin_convertvector(a.part[i], FloatPart);
    return v;
}
INLINE Floats select(Ints mask, Floats yes, Floats no) { return as_floats((mask & as_ints(yes)) | (as_ints(no) & (mask ^ broadcast(-1)))); }
INLINE Ints lane_numbers() {
    alignas(64) static const int32_t numbers[lanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return load(numbers);
}
// True in the first n lanes.
INLINE Ints first(long n) { return lane_numbers() < broadcast((int32_t)n); }

// Sum of the lanes as a tree: 8 + 8, 4 + 4, 2 + 2, 1 + 1.
INLINE float sum(Floats v) {
#if defined(__x86_64__)
#if defined(LOWBIT_AVX512)
    const __m256 eight = _mm512_castps512_ps256((__m512)v.part[0]) + _mm512_extractf32x8_ps((__m512)v.part[0], 1);
    const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
#elif defined(LOWBIT_AVX2)
    const __m256 eight = (__m256)(v.part[0] + v.part[1]);
    const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
#else
    const __m128 four = (__m128)((v.part[0] + v.part[2]) + (v.part[1] + v.part[3]));
#endif
    const __m128 two = four + _mm_movehl_ps(four, four);
    return two[0] + two[1];
#else
    float x[lanes];
    store(x, v);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
#endif
}

// Instructions of their own -----------------------------------------------------------------------------------------

// a * b + c; fused where the processor can.
INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(LOWBIT_AVX512)
    return {(FloatPart)_mm512_fmadd_ps((__m512)a.part[0], (__m512)b.part[0], (__m512)c.part[0])};
#elif defined(LOWBIT_AVX2)
    EACH c.part[i] = (FloatPart)_mm256_fmadd_ps((__m256)a.part[i], (__m256)b.part[i], (__m256)c.part[i]);
    return c;
#elif defined(LOWBIT_NEON)
    EACH c.part[i] = (FloatPart)vfmaq_f32((float32x4_t)c.part[i], (float32x4_t)a.part[i], (float32x4_t)b.part[i]);
    return c;
#else
    return a * b + c;
#endif
}

// Sums of two neighbouring products of 16-bit integers, added to c.
INLINE Ints multiply_pairs(Ints a, Ints b, Ints c) {
#if defined(LOWBIT_AVX512)
    return {(IntPart)_mm512_dpwssd_epi32((__m512i)c.part[0], (__m512i)a.part[0], (__m512i)b.part[0])};
#elif defined(LOWBIT_AVX2)
    EACH c.part[i] += (IntPart)_mm256_madd_epi16((__m256i)a.part[i], (__m256i)b.part[i]);
    return c;
#elif defined(__SSE2__)
    EACH c.part[i] += (IntPart)_mm_madd_epi16((__m128i)a.part[i], (__m128i)b.part[i]);
    return c;
#else
    Ints high, low;
    EACH high.part[i] = (a.part[i] >> 16) * (b.part[i] >> 16);
    EACH low.part[i] = (a.part[i] << 16 >> 16) * (b.part[i] << 16 >> 16);
    return c + high + low;
#endif
}

// A bit for each lane of a mask.
INLINE uint32_t bits(Ints mask) {
    uint32_t found = 0;
#if defined(LOWBIT_AVX512)
    found = _mm512_movepi32_mask((__m512i)mask.part[0]);
#elif defined(LOWBIT_AVX2)
    EACH found |= (uint32_t)_mm256_movemask_ps((__m256)mask.part[i]) << 8 * i;
#elif defined(__SSE2__)
    EACH found |= (uint32_t)_mm_movemask_ps((__m128)mask.part[i]) << 4 * i;
#else
    UNROLL for (int i = 0; i < lanes; i++) found |= (uint32_t)(mask.part[i / 4][i % 4] & 1) << i;
#endif
    return found;
}
// Bits of a >= b; NaN gives 0.
INLINE uint32_t at_least(Floats a, Floats b) {
#if defined(LOWBIT_AVX512)
    return _mm512_cmp_ps_mask((__m512)a.part[0], (__m512)b.part[0], _CMP_GE_OQ);
#else
    return bits(a >= b);
#endif
}
INLINE uint32_t at_most(Ints a, Ints b) {
#if defined(LOWBIT_AVX512)
    return _mm512_cmple_epi32_mask((__m512i)a.part[0], (__m512i)b.part[0]);
#else
    return bits(a <= b);
#endif
}
// Bits of x <= low or x >= high.
INLINE uint32_t outside(Ints x, Ints low, Ints high) {
#if defined(LOWBIT_AVX512)
    const __m512i v = (__m512i)x.part[0];
    return _mm512_cmple_epi32_mask(v, (__m512i)low.part[0]) | _mm512_cmpge_epi32_mask(v, (__m512i)high.part[0]);
#else
    return bits((x <= low) | (x >= high));
#endif
}
INLINE uint32_t first_bits(long n) { return n >= lanes ? 0xffff : (1u << (n > 0 ? n : 0)) - 1; }

// table[index % 16] of a table of 16.
INLINE Floats look_up(const float* table, Ints index) {
#if defined(LOWBIT_AVX512)
    return {(FloatPart)_mm512_permutexvar_ps((__m512i)index.part[0], _mm512_loadu_ps(table))};
#elif defined(LOWBIT_AVX2)
    Floats v;
    const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
    EACH {
        const __m256i at = (__m256i)index.part[i];
        v.part[i] = (FloatPart)_mm256_blendv_ps(
            _mm256_permutevar8x32_ps(low, at), _mm256_permutevar8x32_ps(high, at), (__m256)_mm256_slli_epi32(at, 28));
    }
    return v;
#else
    int32_t at[lanes];
    float x[lanes];
    store(at, index);
    for (int i = 0; i < lanes; i++) x[i] = table[at[i] & 15];
    return load(x);
#endif
}

// Ones in each lane, or in each of its four bytes, see `Mismatches` in matmul.h.
INLINE Ints ones(Ints x) {
#if defined(LOWBIT_AVX512)
    return {(IntPart)_mm512_popcnt_epi32((__m512i)x.part[0])};
#elif defined(LOWBIT_AVX2)
    const __m256i table = _mm256_setr_epi8(
        0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const __m256i nibble = _mm256_set1_epi8(15);
    EACH {
        const __m256i low = _mm256_and_si256((__m256i)x.part[i], nibble);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16((__m256i)x.part[i], 4), nibble);
        x.part[i] = (IntPart)_mm256_add_epi8(_mm256_shuffle_epi8(table, low), _mm256_shuffle_epi8(table, high));
    }
    return x;
#elif defined(LOWBIT_NEON)
    EACH x.part[i] = (IntPart)vcntq_u8((uint8x16_t)x.part[i]);
    return x;
#else
    x = x - ((x >> 1) & broadcast(0x55555555));
    x = (x & broadcast(0x33333333)) + ((x >> 2) & broadcast(0x33333333));
    return (x + (x >> 4)) & broadcast(0x0f0f0f0f);
#endif
}

// Keeps the compiler from knowing what v holds.
INLINE void forget(Ints& v) {
#if defined(__x86_64__)
    EACH __asm__ volatile("" : "+v"(v.part[i]));
#elif defined(__aarch64__)
    EACH __asm__ volatile("" : "+w"(v.part[i]));
#endif
}

// exp of values from -87 to 88, others clipped; relative error below 3e-7.
INLINE Floats exponential(Floats x) {
    x = select(x >= broadcast(88.0f), broadcast(88.0f), select(broadcast(-87.0f) >= x, broadcast(-87.0f), x));
    const Floats magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Floats rounded = x * broadcast(1.44269504f) + magic;
    const Floats power = rounded - magic;
    const Floats r = x - power * broadcast(0.693359375f) + power * broadcast(2.12194440e-4f);
    Floats y = broadcast(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) y = y * r + broadcast(c);
    y = y * r * r + r + broadcast(1.0f);
    return as_floats(as_ints(y) + (as_ints(rounded) << 23));
}

// Calls f(start, count) for each 16 of n values, the last ones fewer.
template <class Function>
INLINE void sixteens(long n, Function f) {
    long at = 0;
    for (; at + lanes <= n; at += lanes) f(at, (long)lanes);
    if (at < n) f(at, n - at);
}

INLINE long words_of(long bits) { return (bits + 63) / 64; }

}  // namespace LOWBIT_ISA
