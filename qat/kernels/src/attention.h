// Binary attention of one head, on bits.
//
//     logits = scale * (dim - 2 mismatches(q, k)),   A = softmax(logits),   map = 1 where A > s / 2, else 0,   count = map sign(v)
//
// A row has one threshold, so its map is an integer comparison: e[c] = exp(-2 scale c) falls with the mismatches c, and A > s / 2 where
// e[c] > s / 2 * (sum of e over the row). The last product is a binary one too: with 0 as -1, count = (values that are +1) - mismatches(map, v).
#pragma once
#include "binary.h"

namespace LOWBIT_ISA {

// e[c], which is fine[c % 16] * coarse[c / 16] for heads of up to 255 features.
struct Exponentials {
    static constexpr int largest_dim = 4096;
    float fine[lanes], coarse[lanes], all[largest_dim + lanes];
    long count;

    Exponentials(float scale, long dim) : count(dim + 1) {
        for (int i = 0; i < lanes; i++) {
            fine[i] = (float)std::exp(-2.0 * scale * i);
            coarse[i] = (float)std::exp(-2.0 * scale * lanes * i);
        }
        for (long c = 0; c < count; c++) all[c] = dim < 256 ? fine[c % lanes] * coarse[c / lanes] : (float)std::exp(-2.0 * scale * c);
    }
    INLINE_MEMBER Floats of(Ints c, long n) const {
        if (count <= 256) return look_up(fine, c) * look_up(coarse, c >> 4);
        int32_t at[lanes];
        float found[lanes] = {};
        store(at, c);
        for (long i = 0; i < n; i++) found[i] = all[at[i]];
        return load(found);
    }

    // The largest c with e[c] > bound, -1 if there is none.
    INLINE_MEMBER int32_t last_above(float bound) const {
        int32_t above = 0;
        for (long c = 0; c < count; c += lanes) above += __builtin_popcount(~at_least(broadcast(bound), load(all + c, count - c)) & first_bits(count - c));
        return above - 1;
    }
};

// The most mismatches that a row of the attention map has its bits for, from the mismatches of its query with every key.
INLINE int32_t last_of_row(const int32_t* row, long tokens, const Exponentials& e, float half_map_scale) {
    Floats sums = {};
    sixteens(tokens, [&](long at, long n) {
        const Floats x = e.of(load(row + at), n);
        sums = sums + (n < lanes ? select(first(n), x, broadcast(0.0f)) : x);
    });
    return e.last_above(half_map_scale * sum(sums));
}

INLINE void map_row(const int32_t* row, long tokens, int32_t last, uint64_t* packed) {
    for (long at = 0; at < tokens; at += 64) {
        uint64_t word = 0;
        sixteens(tokens - at < 64 ? tokens - at : 64, [&](long i, long n) { word |= (uint64_t)(at_most(load(row + at + i), broadcast(last)) & first_bits(n)) << i; });
        packed[at / 64] = word;
    }
}

// Of each of eight squares, side by side: rows of 64 bits become columns.
INLINE void turn(uint64_t x[64][8]) {
    uint64_t keep = 0x00000000ffffffff;
    for (int half = 32; half; half /= 2, keep ^= keep << half)
        for (int i = 0; i < 64; i = ((i | half) + 1) & ~half)
            for (int square = 0; square < 8; square++) {
                const uint64_t swapped = ((x[i][square] >> half) ^ x[i | half][square]) & keep;
                x[i | half][square] ^= swapped;
                x[i][square] ^= swapped << half;
            }
}

// Values (tokens, words) become (dim, words of tokens).
INLINE void turn_all(const uint64_t* rows, long tokens, long dim, uint64_t* turned) {
    const long words = words_of(dim), token_words = words_of(tokens);
    for (long t = 0; t < token_words; t += 8)
        for (long w = 0; w < words; w++) {
            const long squares = token_words - t < 8 ? token_words - t : 8;
            uint64_t x[64][8] = {};
            for (long i = 0; i < 64 * squares && 64 * t + i < tokens; i++) x[i % 64][i / 64] = rows[(64 * t + i) * words + w];
            turn(x);
            for (long i = 0; i < 64 && 64 * w + i < dim; i++) std::memcpy(turned + (64 * w + i) * token_words + t, x[i], 8 * squares);
        }
}

// Memory of one head. Queries, keys and values are rows of words, filled by the caller.
struct Head {
    long tokens, dim, words, token_words, padded;
    uint64_t *queries, *keys, *values, *turned, *maps, *right;
    int32_t* counts;

    Head(long tokens, long dim) : tokens(tokens), dim(dim), words(words_of(dim)), token_words(words_of(tokens)) {
        using namespace lowbit;
        padded = (tokens + columns - 1) / columns * columns;
        const long right_words = (padded * words > (dim + columns) * token_words) ? padded * words : (dim + columns) * token_words;
        queries = (uint64_t*)scratch(QUERIES, 8 * tokens * words);
        keys = (uint64_t*)scratch(KEYS, 8 * tokens * words);
        values = (uint64_t*)scratch(VALUES, 8 * tokens * words);
        turned = (uint64_t*)scratch(TURNED, 8 * (dim * token_words + right_words));
        right = turned + dim * token_words;
        maps = (uint64_t*)scratch(MAPS, 8 * tokens * token_words);
        const long row_counts = rows_at_once * padded;
        counts = (int32_t*)scratch(COUNTS, 4 * (row_counts > dim ? row_counts : dim));
    }

    // Calls finish(token, column, present, sums) with the sums of map sign(v), two times 16.
    template <class Finish>
    INLINE_MEMBER void attend(const Exponentials& e, float map_scale, Finish finish) {
        prepare_popcounts(keys, tokens, words, right);
        const Popcounts products(queries, tokens, right, words);
        for (long row = 0; row < tokens; row += rows_at_once) {
            const long count = tokens - row < rows_at_once ? tokens - row : rows_at_once;
            for (long panel = 0; panel < padded / columns; panel++) products.block(row, count, panel, counts + panel * columns, padded, [](long, long) {});
            int32_t last[rows_at_once];
            for (long r = 0; r < count; r++) last[r] = last_of_row(counts + r * padded, tokens, e, 0.5f * map_scale);
            for (long r = 0; r < count; r++) map_row(counts + r * padded, tokens, last[r], maps + (row + r) * token_words);
        }
        turn_all(values, tokens, dim, turned);
        prepare_popcounts(turned, dim, token_words, right);
        int32_t* positive = counts;  // values of a column; the mismatches are no longer needed
        for (long d = 0; d < dim; d++) {
            positive[d] = 0;
            for (long w = 0; w < token_words; w++) positive[d] += __builtin_popcountll(turned[d * token_words + w]);
        }
        binary_product<Popcounts>(maps, right, tokens, dim, token_words, [&](const Popcounts&, long column, long present) {
            const Ints first_positive = load(positive + column, present), second_positive = load(positive + column + lanes, present - lanes);
            return [=](long token, Ints first, Ints second) { finish(token, column, present, first_positive - first, second_positive - second); };
        });
    }
};

}  // namespace LOWBIT_ISA
