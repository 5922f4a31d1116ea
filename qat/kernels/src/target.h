// Everything up to target_end.h may use the instructions of LOWBIT_TARGET. What is not ours has to be included before.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "threads.h"

#define LOWBIT_PRAGMA_(text) _Pragma(#text)
#define LOWBIT_PRAGMA(text) LOWBIT_PRAGMA_(text)
#if defined(__clang__)
LOWBIT_PRAGMA(clang attribute push(__attribute__((target(LOWBIT_TARGET))), apply_to = function))
#else
LOWBIT_PRAGMA(GCC target(LOWBIT_TARGET))
#endif
