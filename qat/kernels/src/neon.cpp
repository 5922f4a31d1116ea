// NEON, which every 64-bit ARM processor has.
#if defined(__aarch64__)
#include <arm_neon.h>

#define LOWBIT_ISA neon
#define LOWBIT_BYTES 16
#define LOWBIT_NEON
#include "blocks.h"
#endif
