// Closes what target.h opens.
#if defined(__clang__)
#pragma clang attribute pop
#endif
