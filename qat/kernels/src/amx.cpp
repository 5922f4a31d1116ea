// AVX-512 with AMX: binary products by tiles of bytes.
#if defined(__x86_64__) && defined(__has_include)
#if __has_include(<amxint8intrin.h>) || __has_include(<amxintrin.h>)  // GCC, Clang
#include <immintrin.h>

#define LOWBIT_ISA amx
#define LOWBIT_BYTES 64
#define LOWBIT_AVX512
#define LOWBIT_AMX
#define LOWBIT_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,avx512vnni,amx-tile,amx-int8,fma,popcnt"
#include "target.h"
#include "blocks.h"
#include "target_end.h"
#endif
#endif
