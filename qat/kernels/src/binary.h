// The binary product: rows of bits with panels of 32 columns, by popcounts, or by the tiles of AMX.
#pragma once
#include "matmul.h"
#if defined(LOWBIT_AMX)
#include "tiles.h"
#endif

namespace LOWBIT_ISA {

// Right operand: panels of [2 * words][32] halves of words.
INLINE void prepare_popcounts(const uint64_t* rows, long width, long words, uint64_t* right) {
    for (long column = 0; column < width; column += columns, right += columns * words)
        for (long c = 0; c < columns; c++)
            for (long w = 0; w < words; w++) {
                const uint64_t word = column + c < width ? rows[(column + c) * words + w] : 0;
                uint32_t* to = (uint32_t*)right + 2 * w * columns + c;
                to[0] = (uint32_t)word;
                to[columns] = (uint32_t)(word >> 32);
            }
}

struct Popcounts {
    static constexpr int rows_at_once = LOWBIT_ISA::rows_at_once;
    const int32_t *left, *right;
    long elements;

    Popcounts(const uint64_t* bits, long, const uint64_t* prepared, long words)
        : left((const int32_t*)bits), right((const int32_t*)prepared), elements(2 * words) {}
    void open(long) {}
    template <class Meanwhile>
    INLINE_MEMBER void block(long row, long rows, long panel, int32_t* tile, long pitch, Meanwhile meanwhile) const {
        blocks<Mismatches>(left + row * elements, elements, rows, right + panel * elements * columns, elements, tile, pitch);
        meanwhile(0, 1);
    }
    INLINE_MEMBER Ints dots(Ints sums, long k) const { return broadcast((int32_t)k) - (sums + sums); }
};

#if defined(LOWBIT_AMX)
typedef Tiles Binary;
INLINE void prepare_binary(const uint64_t* rows, long width, long words, uint64_t* right) { prepare_tiles(rows, width, words, right); }
#else
typedef Popcounts Binary;
INLINE void prepare_binary(const uint64_t* rows, long width, long words, uint64_t* right) { prepare_popcounts(rows, width, words, right); }
#endif

// The product of `rows` rows of bits. For each panel `finish(binary, column, present)`, where at least one and maybe more than 32 columns are
// present, gives a function that is called with each row and its sums, two times 16.
template <class Binary, class Finish>
INLINE void binary_product(const uint64_t* bits, const uint64_t* right, long rows, long width, long words, Finish finish) {
    alignas(64) int32_t tiles[2][Binary::rows_at_once * columns];  // one is finished while the other is made
    Binary binary(bits, rows, right, words);
    for (long panel = 0; panel * columns < width; panel++) {
        const auto finish_row = finish(binary, panel * columns, width - panel * columns);
        const auto finish_rows = [&](long begin, long end, const int32_t* tile) {
            for (long row = begin; row < end; row++, tile += columns) finish_row(row, load(tile), load(tile + lanes));
        };
        binary.open(panel);
        long made = 0, before = 0;  // the tile in the making, and the rows of the other one
        for (long row = 0; row < rows; row += Binary::rows_at_once, made ^= 1, before = Binary::rows_at_once)
            binary.block(row, rows - row < Binary::rows_at_once ? rows - row : Binary::rows_at_once, panel, tiles[made], columns, [&](long step, long steps) {
                const long begin = before * step / steps, end = before * (step + 1) / steps;
                finish_rows(row - before + begin, row - before + end, tiles[made ^ 1] + begin * columns);
            });
        finish_rows((rows - 1) / Binary::rows_at_once * Binary::rows_at_once, rows, tiles[made ^ 1]);
    }
}

}  // namespace LOWBIT_ISA
