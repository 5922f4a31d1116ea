// What a file of an instruction set exports: LOWBIT_ISA_name for each name below, called by `native.py`. Lengths are in elements, bits in
// words of 64; pointers that may be null say so. Layouts are in docs/decisions/0011-kernels.md.
#pragma once
#include "attention.h"
#include "rows.h"

#define JOINED_(a, b) a##_##b
#define JOINED(a, b) JOINED_(a, b)
#define KERNEL(name) EXPORT void JOINED(LOWBIT_ISA, name)

namespace LOWBIT_ISA {

using lowbit::parallel;
using lowbit::scratch;

KERNEL(prepare_binary)(const uint64_t* rows, long width, long words, uint64_t* right) { LOWBIT_ISA::prepare_binary(rows, width, words, right); }

// Signs of x - threshold, or of x - threshold - gain * (mean of the rows of a group); gain may be null.
KERNEL(sign_pack)(
    const float* x, const float* threshold, const float* gain, long groups, long rows, long k, long thresholds, uint64_t* packed) {
    if (gain) {
        float* moved = (float*)scratch(lowbit::MOVED, 4 * groups * k);
        for (long g = 0; g < groups; g++) moved_row(x + g * rows * k, rows, threshold + g % thresholds * k, gain, k, moved + g * k);
        threshold = moved;
        thresholds = groups;
    }
    parallel(groups * rows, 1, [=](long begin, long end) {
        for (long r = begin; r < end; r++) pack_row(x + r * k, threshold + r / rows % thresholds * k, k, packed + r * words_of(k));
    });
}

KERNEL(norm_sign_pack)(
    const float* x, const float* weight, const float* bias, float eps, const float* threshold, long groups, long rows, long k, long thresholds, uint64_t* packed) {
    parallel(groups * rows, 1, [=](long begin, long end) {
        for (long r = begin; r < end; r++)
            norm_pack_row(x + r * k, weight, bias, k, eps, threshold + r / rows % thresholds * k, packed + r * words_of(k));
    });
}

KERNEL(layer_norm)(const float* x, const float* weight, const float* bias, float eps, long rows, long k, float* y) {
    parallel(rows, 1, [=](long begin, long end) {
        for (long r = begin; r < end; r++) norm_row(x + r * k, weight, bias, k, eps, y + r * k);
    });
}

KERNEL(gelu)(const float* x, long count, float* y) {
    parallel(count, 1024, [=](long begin, long end) {
        sixteens(end - begin, [&](long at, long n) { store(y + begin + at, gelu(load(x + begin + at, n)), n); });
    });
}

KERNEL(softmax)(const float* x, long rows, long k, float* y) {
    parallel(rows, 1, [=](long begin, long end) {
        for (long r = begin; r < end; r++) softmax_row(x + r * k, k, y + r * k);
    });
}

KERNEL(rprelu)(const float* x, const float* before, const float* slope, const float* after, long rows, long n, float* y) {
    parallel(rows, 1, [=](long begin, long end) {
        for (long r = begin; r < end; r++)
            sixteens(n, [&](long at, long m) {
                store(y + r * n + at, bent(load(x + r * n + at, m), load(before + at, m), load(slope + at, m), load(after + at, m)), m);
            });
    });
}

KERNEL(shortcut)(const float* x, long rows, long k, long n, float* y) {
    parallel(rows, 1, [=](long begin, long end) {
        for (long r = begin; r < end; r++) shortcut_row(x + r * k, k, n, y + r * n);
    });
}

// The tail of a `react` layer: y (rows, n) is what the layer gives, x (rows, k) its input; residual may be null.
KERNEL(react)(
    const float* y, const float* x, const float* weight, const float* bias, float eps, const float* before, const float* slope, const float* after,
    const float* residual, long rows, long n, long k, float* to) {
    parallel(rows, 1, [=](long begin, long end) {
        float* carried = (float*)scratch(lowbit::ROW, 4 * n);
        for (long r = begin; r < end; r++) {
            const float* row = y + r * n;
            shortcut_row(x + r * k, k, n, carried);
            const Moments m = moments(row, n, eps);
            sixteens(n, [&](long at, long count) {
                const Floats z = normalized(load(row + at, count), m, load(weight + at, count), load(bias + at, count)) + load(carried + at, count);
                const Floats out = bent(z, load(before + at, count), load(slope + at, count), load(after + at, count));
                store(to + r * n + at, residual ? out + load(residual + r * n + at, count) : out, count);
            });
        }
    });
}

KERNEL(binary_gemm)(const uint64_t* bits, const uint64_t* weight, long rows, long n, long k, int32_t* y) {
    parallel(rows, Binary::rows_at_once, [=](long begin, long end) {
        const long words = words_of(k);
        binary_product<Binary>(bits + begin * words, weight, end - begin, n, words, [=](const Binary& binary, long column, long present) {
            return [=, &binary](long row, Ints first, Ints second) {
                int32_t* to = y + (begin + row) * n + column;
                store(to, binary.dots(first, k), present);
                store(to + lanes, binary.dots(second, k), present - lanes);
            };
        });
    });
}

// scale * dot + bias + residual of 16 columns; bias and residual may be null.
struct Affine {
    Floats scale, bias;
    bool biased;
    Affine(const float* scales, const float* biases, long column, long n)
        : scale(load(scales + column, n)), bias(biases ? load(biases + column, n) : Floats{}), biased(biases) {}
    INLINE_MEMBER void finish(Ints dots, const float* residual, long at, long n, float* y) const {
        Floats z = scale * to_floats(dots);
        if (biased) z = z + bias;
        if (residual) z = z + load(residual + at, n);
        store(y + at, z, n);
    }
};

KERNEL(binary_linear)(
    const uint64_t* bits, const uint64_t* weight, const float* scale, const float* bias, const float* residual, long rows, long n, long k, float* y) {
    parallel(rows, Binary::rows_at_once, [=](long begin, long end) {
        const long words = words_of(k);
        binary_product<Binary>(bits + begin * words, weight, end - begin, n, words, [=](const Binary& binary, long column, long present) {
            const Affine left(scale, bias, column, present), right(scale, bias, column + lanes, present - lanes);
            return [=, &binary](long row, Ints first, Ints second) {
                const long at = (begin + row) * n + column;
                left.finish(binary.dots(first, k), residual, at, present, y);
                right.finish(binary.dots(second, k), residual, at + lanes, present - lanes, y);
            };
        });
    });
}

// Bounds of 32 columns; a bit is set where x <= low or x >= high.
struct Bounds {
    Ints low[2], high[2];
    uint32_t present;
    Bounds(const int32_t* lows, const int32_t* highs, long column, long n)
        : low{load(lows + column, n), load(lows + column + lanes, n - lanes)},
          high{load(highs + column, n), load(highs + column + lanes, n - lanes)},
          present(first_bits(n) | first_bits(n - lanes) << lanes) {}
    INLINE_MEMBER uint32_t bits(Ints first, Ints second) const {
        return (outside(first, low[0], high[0]) | outside(second, low[1], high[1]) << lanes) & present;
    }
};

KERNEL(binary_linear_bits)(
    const uint64_t* bits, const uint64_t* weight, const int32_t* low, const int32_t* high, long rows, long n, long k, uint64_t* packed) {
    parallel(rows, Binary::rows_at_once, [=](long begin, long end) {
        const long words = words_of(k), halves = 2 * words_of(n);
        uint32_t* to = (uint32_t*)packed + begin * halves;
        for (long r = 0; r < end - begin; r++) to[(r + 1) * halves - 1] = 0;  // the last half may have no column
        binary_product<Binary>(bits + begin * words, weight, end - begin, n, words, [=](const Binary& binary, long column, long present) {
            const Bounds bounds(low, high, column, present);
            return [=, &binary](long row, Ints first, Ints second) {
                to[row * halves + column / columns] = bounds.bits(binary.dots(first, k), binary.dots(second, k));
            };
        });
    });
}

// qkv (batch, tokens, 3, heads, dim), threshold (3, thresholds, heads, dim) with one or `batch` thresholds.
KERNEL(binary_attention)(
    const float* qkv, const float* threshold, float logit_scale, float map_scale, long batch, long tokens, long heads, long dim, long thresholds, float* y) {
    parallel(batch * heads, 1, [=](long begin, long end) {
        Head memory(tokens, dim);
        const Exponentials e(logit_scale, dim);
        for (long i = begin; i < end; i++) {
            const long b = i / heads, h = i % heads;
            uint64_t* operands[3] = {memory.queries, memory.keys, memory.values};
            for (long o = 0; o < 3; o++)
                for (long t = 0; t < tokens; t++)
                    pack_row(
                        qkv + (((b * tokens + t) * 3 + o) * heads + h) * dim, threshold + ((o * thresholds + b % thresholds) * heads + h) * dim, dim,
                        operands[o] + t * memory.words);
            memory.attend(e, map_scale, [=](long token, long column, long present, Ints first, Ints second) {
                float* to = y + ((b * tokens + token) * heads + h) * dim + column;
                store(to, broadcast(map_scale) * to_floats(first), present);
                store(to + lanes, broadcast(map_scale) * to_floats(second), present - lanes);
            });
        }
    });
}

// The same with bits in, (batch, tokens, 3, heads, words), and bits out: count <= low or count >= high of each of heads * dim. dim is a multiple of 64.
KERNEL(binary_attention_bits)(
    const uint64_t* qkv, const int32_t* low, const int32_t* high, float logit_scale, float map_scale, long batch, long tokens, long heads, long dim,
    uint64_t* packed) {
    parallel(batch * heads, 1, [=](long begin, long end) {
        Head memory(tokens, dim);
        const Exponentials e(logit_scale, dim);
        const long words = memory.words;
        for (long i = begin; i < end; i++) {
            const long b = i / heads, h = i % heads;
            for (long t = 0; t < tokens; t++) {
                const uint64_t* from = qkv + ((b * tokens + t) * 3 * heads + h) * words;
                for (long w = 0; w < words; w++) {
                    memory.queries[t * words + w] = from[w];
                    memory.keys[t * words + w] = from[heads * words + w];
                    memory.values[t * words + w] = from[2 * heads * words + w];
                }
            }
            memory.attend(e, map_scale, [=](long token, long column, long present, Ints first, Ints second) {
                const Bounds bounds(low + h * dim, high + h * dim, column, present);
                ((uint32_t*)(packed + ((b * tokens + token) * heads + h) * words))[column / columns] = bounds.bits(first, second);
            });
        }
    });
}

// Floats: weight (n, k) becomes panels of 32 columns.
KERNEL(prepare_linear)(const int32_t* rows, long n, long k, int32_t* right) {
    for (long column = 0; column < n; column += columns, right += columns * k)
        for (long c = 0; c < columns; c++)
            for (long e = 0; e < k; e++) right[e * columns + c] = column + c < n ? rows[(column + c) * k + e] : 0;
}

// y = x weight^T + bias; bias may be null.
KERNEL(linear)(const float* x, const int32_t* weight, const float* bias, long rows, long n, long k, float* y) {
    parallel(rows, rows_at_once, [=](long begin, long end) {
        product<Reals>((const int32_t*)x, weight, begin, end, n, k, [&](long row, long column, long count, Floats sums) {
            store(y + row * n + column, bias ? sums + load(bias + column, count) : sums, count);
        });
    });
}

// y = scale * (steps weight^T) + bias, exact in integers; steps and weight are pairs of 16 bits, `pairs` to a row; bias may be null.
KERNEL(integer_linear)(const int32_t* steps, const int32_t* weight, const float* scale, const float* bias, long rows, long n, long pairs, float* y) {
    parallel(rows, rows_at_once, [=](long begin, long end) {
        product<Pairs>(steps, weight, begin, end, n, pairs, [&](long row, long column, long count, Ints sums) {
            const Floats z = load(scale + column, count) * to_floats(sums);
            store(y + row * n + column, bias ? z + load(bias + column, count) : z, count);
        });
    });
}

// One option of each group: the least loss at every total weight, the cost of that choice, and the option (groups, size) that leads there, the
// first of equals. Weights of a group rise from 0. At the start loss is 0 in cell 0 and infinite elsewhere, also in as many cells before it as
// the largest weight; `size` is a multiple of 16. Larger weights first, so that in place a cell is reached from those before it.
KERNEL(knapsack)(
    const long* weight, const double* more_loss, const double* more_cost, long groups, long options, long size, double* loss, double* cost, uint8_t* choice) {
    typedef Doubles::Part Part;
    typedef double Loose __attribute__((vector_size(LOWBIT_BYTES), aligned(8), may_alias));
    for (long g = 0, reach = 1; g < groups; g++, weight += options, more_loss += options, more_cost += options, choice += size) {
        reach += weight[options - 1];
        for (long begin = (reach - 1) / lanes * lanes; begin >= 0; begin -= lanes) {
            Part least[2 * parts], spent[2 * parts] = {}, chosen[2 * parts] = {};
            UNROLL for (int i = 0; i < 2 * parts; i++) least[i] = Part{} + INFINITY;
            for (long j = 0; j < options; j++) {
                const Loose *losses = (const Loose*)(loss + begin - weight[j]), *costs = (const Loose*)(cost + begin - weight[j]);
                UNROLL for (int i = 0; i < 2 * parts; i++) {
                    const Part candidate = losses[i] + more_loss[j];
                    const auto better = candidate < least[i];
                    least[i] = better ? candidate : least[i];
                    spent[i] = better ? costs[i] + more_cost[j] : spent[i];
                    chosen[i] = better ? Part{} + (double)j : chosen[i];
                }
            }
            UNROLL for (int i = 0; i < 2 * parts; i++) ((Loose*)(loss + begin))[i] = least[i], ((Loose*)(cost + begin))[i] = spent[i];
            for (int i = 0; i < lanes; i++) choice[begin + i] = ((const double*)chosen)[i];
        }
    }
}

// As many binary operations as the processor can do in registers, for benchmarks: `popcount_operations` in each round.
constexpr int popcount_chains = parts == 1 ? 8 : 2;
EXPORT const long JOINED(LOWBIT_ISA, popcount_operations) = popcount_chains * lanes * 32 * 2;
KERNEL(popcount_limit)(long rounds, int32_t* found) {
    Ints a = load(found), b[popcount_chains], sums[popcount_chains] = {};
    for (int i = 0; i < popcount_chains; i++) b[i] = a + broadcast(i);
    for (long r = 0; r < rounds; r++) {
        forget(a);
        UNROLL for (int i = 0; i < popcount_chains; i++) sums[i] = Mismatches::add(a, b[i], sums[i]);
    }
    for (int i = 1; i < popcount_chains; i++) sums[0] = sums[0] + sums[i];
    store(found, sums[0]);
}

}  // namespace LOWBIT_ISA
