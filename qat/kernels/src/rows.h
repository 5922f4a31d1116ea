// What works on rows of floats: sign and pack, LayerNorm, GELU, softmax, and the tail of a `react` layer.
#pragma once
#include "simd.h"

namespace LOWBIT_ISA {

// Bits of values(at, n) >= threshold, of k values; NaN gives 0.
template <class Values>
INLINE void pack_row(Values values, const float* threshold, long k, uint64_t* packed) {
    for (long at = 0; at < k; at += 64) {
        uint64_t word = 0;
        if (at + 64 <= k)
            UNROLL for (long i = 0; i < 64; i += lanes) word |= (uint64_t)at_least(values(at + i, (long)lanes), load(threshold + at + i)) << i;
        else
            sixteens(k - at, [&](long i, long n) { word |= (uint64_t)(at_least(values(at + i, n), load(threshold + at + i, n)) & first_bits(n)) << i; });
        packed[at / 64] = word;
    }
}
INLINE void pack_row(const float* x, const float* threshold, long k, uint64_t* packed) {
    pack_row([=](long at, long n) { return load(x + at, n); }, threshold, k, packed);
}

// threshold + gain * (mean of x over its rows), for each of k columns; the mean is rounded once, from sums in double precision.
INLINE void moved_row(const float* x, long rows, const float* threshold, const float* gain, long k, float* moved) {
    for (long at = 0; at < k; at += 2 * lanes) {
        Doubles sums[2] = {};
        const long left = k - at;
        for (long r = 0; r < rows; r++, x += k)
            if (left >= 2 * lanes)
                UNROLL for (int i = 0; i < 2; i++) sums[i].add(x + at + i * lanes);
            else {
                float present[2 * lanes] = {};
                std::memcpy(present, x + at, 4 * left);
                UNROLL for (int i = 0; i < 2; i++) sums[i].add(present + i * lanes);
            }
        x -= rows * k;
        for (long i = 0; i < left && i < 2 * lanes; i++) moved[at + i] = threshold[at + i] + gain[at + i] * (float)(sums[i / lanes].at(i % lanes) / rows);
    }
}

struct Moments {
    float mean, scale;  // scale is one over the deviation
};

template <class Values>
INLINE float total(long k, Values values) {
    Floats sums[4] = {};
    long at = 0;
    for (; at + 4 * lanes <= k; at += 4 * lanes) UNROLL for (int i = 0; i < 4; i++) sums[i] = sums[i] + values(at + i * lanes, (long)lanes);
    sixteens(k - at, [&](long i, long n) { sums[0] = sums[0] + values(at + i, n); });
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

INLINE Moments moments(const float* x, long k, float eps) {
    const float mean = total(k, [&](long at, long n) { return load(x + at, n); }) / k;
    const Floats centre = broadcast(mean);
    const float squares = total(k, [&](long at, long n) {
        const Floats d = load(x + at, n) - centre;
        return n < lanes ? select(first(n), d * d, broadcast(0.0f)) : d * d;
    });
    return {mean, 1 / std::sqrt(squares / k + eps)};
}

INLINE Floats normalized(Floats x, Moments m, Floats weight, Floats bias) { return (x - broadcast(m.mean)) * broadcast(m.scale) * weight + bias; }

INLINE void norm_row(const float* x, const float* weight, const float* bias, long k, float eps, float* to) {
    const Moments m = moments(x, k, eps);
    sixteens(k, [&](long at, long n) { store(to + at, normalized(load(x + at, n), m, load(weight + at, n), load(bias + at, n)), n); });
}

INLINE void norm_pack_row(const float* x, const float* weight, const float* bias, long k, float eps, const float* threshold, uint64_t* packed) {
    const Moments m = moments(x, k, eps);
    pack_row([=](long at, long n) { return normalized(load(x + at, n), m, load(weight + at, n), load(bias + at, n)); }, threshold, k, packed);
}

INLINE Floats bent(Floats x, Floats before, Floats slope, Floats after) {
    const Floats z = x - before;
    return select(z >= broadcast(0.0f), z, slope * z) + after;
}

// Features carried past a layer: repeated to widen, averaged in groups to narrow.
INLINE void shortcut_row(const float* x, long k, long n, float* to) {
    if (n >= k) {
        for (long at = 0; at < n; at += k) std::memcpy(to + at, x, 4 * k);
        return;
    }
    const long group = k / n;
    if (group == 4) {  // a common one, which the compiler makes vectors of
        for (long i = 0; i < n; i++) to[i] = (x[4 * i] + x[4 * i + 1] + x[4 * i + 2] + x[4 * i + 3]) / 4;
        return;
    }
    for (long i = 0; i < n; i++) {
        float added = x[i * group];
        for (long j = 1; j < group; j++) added += x[i * group + j];
        to[i] = added / group;
    }
}

// 0.5 x (1 + erf(x / sqrt 2)), by Abramowitz and Stegun, 7.1.26; error below 1e-6.
INLINE Floats gelu(Floats x) {
    const Floats one = broadcast(1.0f), z = x * broadcast(0.70710678f), size = as_floats(as_ints(z) & broadcast(0x7fffffff));
    const Floats t = one / (one + broadcast(0.3275911f) * size);
    Floats y = broadcast(1.061405429f);
    for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) y = y * t + broadcast(c);
    const Floats tail = y * t * exponential(broadcast(0.0f) - z * z);  // 1 - erf(|z|)
    return broadcast(0.5f) * x * select(z >= broadcast(0.0f), broadcast(2.0f) - tail, tail);
}

INLINE void softmax_row(const float* x, long k, float* to) {
    float largest = x[0];
    for (long i = 1; i < k; i++) largest = x[i] > largest ? x[i] : largest;
    const Floats shift = broadcast(largest);
    const float added = total(k, [&](long at, long n) {
        const Floats e = exponential(load(x + at, n) - shift), present = n < lanes ? select(first(n), e, broadcast(0.0f)) : e;
        store(to + at, present, n);
        return present;
    });
    const Floats divisor = broadcast(added);
    sixteens(k, [&](long at, long n) { store(to + at, load(to + at, n) / divisor, n); });
}

}  // namespace LOWBIT_ISA
