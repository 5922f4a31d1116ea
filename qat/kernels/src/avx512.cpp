// AVX-512 with VPOPCNTDQ and VNNI.
#if defined(__x86_64__)
#include <immintrin.h>

#define LOWBIT_ISA avx512
#define LOWBIT_BYTES 64
#define LOWBIT_AVX512
#define LOWBIT_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,avx512vnni,fma,popcnt"
#include "target.h"
#include "blocks.h"
#include "target_end.h"
#endif
