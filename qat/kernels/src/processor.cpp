// Which of the instruction sets this processor and this build have.
#include <cstring>

#include "threads.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

bool amx() {
#if defined(__x86_64__) && defined(__linux__)
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool present = (d >> 24 & 1) && (d >> 25 & 1);  // tiles, and their 8-bit products
    return present && syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM for the tiles
#else
    return false;
#endif
}

bool avx512() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512vnni");
#else
    return false;
#endif
}

bool avx2() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt");
#else
    return false;
#endif
}

}  // namespace

EXPORT int lowbit_supports(const char* name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
    if (!std::strcmp(name, "amx")) return avx512() && amx();
    if (!std::strcmp(name, "avx512")) return avx512();
    if (!std::strcmp(name, "avx2")) return avx2();
    return 1;
}
