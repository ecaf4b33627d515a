// What the instruction sets' translation units share. The standard headers come first: what they define must not be compiled for more
// than the oldest processor, since the linker keeps one copy of it for all.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <utility>

#include "kernels.h"
#include "numbers.h"

#if defined(PRECIS_PORTABLE)  // a vector is an array here: unrolled, its loops would fill the compiler's memory and nothing else
#define PRECIS_INLINE inline
#define PRECIS_NOINLINE
#define PRECIS_UNROLL
#else
#define PRECIS_INLINE inline __attribute__((always_inline))
#define PRECIS_NOINLINE __attribute__((noinline))
#define PRECIS_UNROLL _Pragma("GCC unroll 16")
#endif
