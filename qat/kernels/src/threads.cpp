#include "threads.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

namespace {

int threads = 1;

struct Block {
    void* memory = nullptr;
    size_t bytes = 0;
    ~Block() { std::free(memory); }
};
thread_local Block blocks[lowbit::PURPOSES];

}  // namespace

EXPORT void lowbit_set_threads(int count) { threads = std::max(count, 1); }

namespace lowbit {

void* scratch(Purpose purpose, size_t bytes) {
    Block& block = blocks[purpose];
    bytes = (bytes + 63) / 64 * 64;
    if (block.bytes < bytes) {
        std::free(block.memory);
        block.memory = std::aligned_alloc(64, bytes);
        block.bytes = block.memory ? bytes : 0;
        if (!block.memory) throw std::bad_alloc();
    }
    return block.memory;
}

void divide(long count, long grain, void (*work)(void*, long, long), void* context) {
    const long grains = (count + grain - 1) / grain, used = std::min<long>(threads, grains);
    if (used <= 1) return work(context, 0, count);
    auto bound = [&](long i) { return std::min(count, grains * i / used * grain); };
    std::vector<std::thread> others;
    for (long i = 1; i < used; i++) others.emplace_back(work, context, bound(i), bound(i + 1));
    work(context, 0, bound(1));
    for (auto& other : others) other.join();
}

}  // namespace lowbit
