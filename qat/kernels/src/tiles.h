// The binary product by the tiles of AMX, which multiply bytes: bits become -1 and +1 where they are used.
#pragma once
#include "matmul.h"

namespace LOWBIT_ISA {

// Bits become bytes of -1 and +1. Right operand: [columns / 16][words][16] words of 64 bits; word r of a tile has in its nibble c the
// bits 4r to 4r + 3 of column c, which is how the instruction wants bytes.
INLINE void prepare_tiles(const uint64_t* rows, long width, long words, uint64_t* right) {
    for (long column = 0; column < (width + columns - 1) / columns * columns; column += lanes)
        for (long w = 0; w < words; w++, right += lanes) {
            uint64_t x[lanes];
            for (long i = 0; i < lanes; i++) x[i] = column + i < width ? rows[(column + i) * words + w] : 0;
            uint64_t keep = 0x00000000ffffffff;
            for (int half = 8, shift = 32; half; half /= 2, shift /= 2, keep ^= keep << shift)
                for (int i = 0; i < lanes; i++)
                    if (!(i & half)) {
                        const uint64_t swapped = ((x[i] >> shift) ^ x[i + half]) & keep;
                        x[i + half] ^= swapped;
                        x[i] ^= swapped << shift;
                    }
            std::memcpy(right, x, sizeof x);
        }
}

struct Tiles {
    static constexpr int rows_at_once = 32;
    static constexpr long tile_bytes = 1024;
    static constexpr long most_words = 12;  // of a panel at a time: as bytes they stay in the first-level cache, beside the sums
    int8_t *left, *right;
    int32_t* sums;
    const uint64_t* prepared;
    long count, words, words_at_once, last;  // `last` is the first of the words that `block` adds

    Tiles(const uint64_t* bits, long count, const uint64_t* prepared, long words) : prepared(prepared), count(count), words(words) {
        const long padded = (count + 31) / 32 * 32, parts = (words + most_words - 1) / most_words;
        words_at_once = (words + parts - 1) / parts;
        last = (parts - 1) * words_at_once;
        left = (int8_t*)lowbit::scratch(lowbit::LEFT_BYTES, padded * words * 64);
        right = (int8_t*)lowbit::scratch(lowbit::RIGHT_BYTES, 2 * words_at_once * tile_bytes);
        sums = (int32_t*)lowbit::scratch(lowbit::SUMS, 4 * padded * columns);
        for (long row = 0; row < count; row++, bits += words) {
            int8_t* to = left + row / 16 * words * tile_bytes + row % 16 * 64;
            for (long w = 0; w < words; w++) expand(bits[w], to + w * tile_bytes);
        }
        // Constant, since the compiler does not know that all of it is read.
        struct Shape {
            uint8_t palette, start, reserved[14];
            uint16_t bytes[16];
            uint8_t rows[16];
        };
        static const Shape shape = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
        _tile_loadconfig(&shape);
        settle();
    }
    ~Tiles() { _tile_release(); }

    static inline void expand(uint64_t bits, int8_t* to) {
        _mm512_store_si512(to, _mm512_mask_blend_epi8(bits, _mm512_set1_epi8(-1), _mm512_set1_epi8(1)));
    }
    // Adds a panel's products of all words before `last`, and makes bytes of the others.
    inline void open(long panel) {
        for (long begin = 0; begin < last; begin += words_at_once) {
            make_bytes(panel, begin);
            for (long row = 0; row < count; row += rows_at_once) multiply(row, count - row, begin, sums + row * columns, columns, [](long, long) {});
        }
        make_bytes(panel, last);
    }
    inline void make_bytes(long panel, long begin) {
        const long here = words - begin < words_at_once ? words - begin : words_at_once;
        for (long half = 0; half < 2; half++) {
            const uint64_t* from = prepared + ((2 * panel + half) * words + begin) * lanes;
            for (long i = 0; i < here * lanes; i++) expand(from[i], right + half * words_at_once * tile_bytes + 64 * i);
        }
        settle();
    }
    // Nor does it know that tiles are loaded from memory that has just been written.
    static inline void settle() { __asm__ volatile("" ::: "memory"); }
    // Sums of the rows from `row` on, a multiple of `rows_at_once`, with a panel.
    template <class Meanwhile>
    INLINE_MEMBER void block(long row, long rows, long, int32_t* tile, long pitch, Meanwhile meanwhile) const {
        multiply(row, rows, last, tile, pitch, meanwhile);
    }
    // The same over the words that are bytes now, the first of them `begin`; those before are in `sums`. Between its steps it calls
    // meanwhile(step, steps), since the processor does not look far enough ahead to find work of its own while the tiles are multiplied.
    template <class Meanwhile>
    INLINE_MEMBER void multiply(long row, long rows, long begin, int32_t* tile, long pitch, Meanwhile meanwhile) const {
        const int8_t *a = left + (row / 16 * words + begin) * tile_bytes, *b = right;
        const long below = words * tile_bytes, beside = words_at_once * tile_bytes;
        const long here = words - begin < words_at_once ? words - begin : words_at_once;
        const int32_t* before = sums + row * columns;
        if (begin) {
            _tile_loadd(0, before, 4 * columns);
            _tile_loadd(1, before + 16, 4 * columns);
        } else {
            _tile_zero(0);
            _tile_zero(1);
        }
        if (rows > 16) {
            if (begin) {
                _tile_loadd(2, before + 16 * columns, 4 * columns);
                _tile_loadd(3, before + 16 * columns + 16, 4 * columns);
            } else {
                _tile_zero(2);
                _tile_zero(3);
            }
            for (long w = 0; w < here; w++, a += tile_bytes, b += tile_bytes) {
                _tile_loadd(4, a, 64);
                _tile_loadd(6, b, 64);
                _tile_loadd(5, a + below, 64);
                _tile_loadd(7, b + beside, 64);
                _tile_dpbssd(0, 4, 6);
                _tile_dpbssd(2, 5, 6);
                _tile_dpbssd(1, 4, 7);
                _tile_dpbssd(3, 5, 7);
                meanwhile(w, here);
            }
            _tile_stored(2, tile + 16 * pitch, 4 * pitch);
            _tile_stored(3, tile + 16 * pitch + 16, 4 * pitch);
        } else {
            for (long w = 0; w < here; w++, a += tile_bytes, b += tile_bytes) {
                _tile_loadd(4, a, 64);
                _tile_loadd(6, b, 64);
                _tile_loadd(7, b + beside, 64);
                _tile_dpbssd(0, 4, 6);
                _tile_dpbssd(1, 4, 7);
                meanwhile(w, here);
            }
        }
        _tile_stored(0, tile, 4 * pitch);
        _tile_stored(1, tile + 16, 4 * pitch);
        settle();
    }
    INLINE_MEMBER Ints dots(Ints sums, long k) const { return sums - broadcast((int32_t)(64 * words - k)); }
};

}  // namespace LOWBIT_ISA
