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
    int8_t *left, *right;
    const uint64_t* prepared;
    long words;

    Tiles(const uint64_t* bits, long count, const uint64_t* prepared, long words) : prepared(prepared), words(words) {
        left = (int8_t*)lowbit::scratch(lowbit::LEFT_BYTES, (count + 31) / 32 * 32 * words * 64);
        right = (int8_t*)lowbit::scratch(lowbit::RIGHT_BYTES, 2 * words * tile_bytes);
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
    // Makes bytes of a panel, before `block` uses it.
    inline void open(long panel) {
        const uint64_t* from = prepared + panel * 2 * words * lanes;
        for (long i = 0; i < 2 * words * lanes; i++) expand(from[i], right + 64 * i);
        settle();
    }
    // Nor does it know that tiles are loaded from memory that has just been written.
    static inline void settle() { __asm__ volatile("" ::: "memory"); }
    // Sums of the rows from `row` on, a multiple of `rows_at_once`, with a panel. Between its steps it calls meanwhile(step, steps),
    // since the processor does not look far enough ahead to find work of its own while the tiles are multiplied.
    template <class Meanwhile>
    INLINE_MEMBER void block(long row, long rows, long, int32_t* tile, long pitch, Meanwhile meanwhile) const {
        const int8_t *a = left + row / 16 * words * tile_bytes, *b = right;
        const long next = words * tile_bytes;
        _tile_zero(0);
        _tile_zero(1);
        if (rows > 16) {
            _tile_zero(2);
            _tile_zero(3);
            for (long w = 0; w < words; w++, a += tile_bytes, b += tile_bytes) {
                _tile_loadd(4, a, 64);
                _tile_loadd(6, b, 64);
                _tile_loadd(5, a + next, 64);
                _tile_loadd(7, b + next, 64);
                _tile_dpbssd(0, 4, 6);
                _tile_dpbssd(2, 5, 6);
                _tile_dpbssd(1, 4, 7);
                _tile_dpbssd(3, 5, 7);
                meanwhile(w, words);
            }
            _tile_stored(2, tile + 16 * pitch, 4 * pitch);
            _tile_stored(3, tile + 16 * pitch + 16, 4 * pitch);
        } else {
            for (long w = 0; w < words; w++, a += tile_bytes, b += tile_bytes) {
                _tile_loadd(4, a, 64);
                _tile_loadd(6, b, 64);
                _tile_loadd(7, b + next, 64);
                _tile_dpbssd(0, 4, 6);
                _tile_dpbssd(1, 4, 7);
                meanwhile(w, words);
            }
        }
        _tile_stored(0, tile, 4 * pitch);
        _tile_stored(1, tile + 16, 4 * pitch);
    }
    INLINE_MEMBER Ints dots(Ints sums, long k) const { return sums - broadcast((int32_t)(64 * words - k)); }
};

}  // namespace LOWBIT_ISA
