// No instructions but those that every processor of the architecture has.
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define LOWBIT_ISA portable
#define LOWBIT_BYTES 16
#include "blocks.h"
