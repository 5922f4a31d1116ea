// AVX2 with FMA.
#if defined(__x86_64__)
#include <immintrin.h>

#define LOWBIT_ISA avx2
#define LOWBIT_BYTES 32
#define LOWBIT_AVX2
#define LOWBIT_TARGET "avx2,fma,popcnt"
#include "target.h"
#include "blocks.h"
#include "target_end.h"
#endif
