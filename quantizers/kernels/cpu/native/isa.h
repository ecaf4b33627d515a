// What the instruction sets' translation units share. The standard headers come first: what they define must not be compiled for more
// than the oldest processor, since the linker keeps one copy of it for all.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <type_traits>

#include "kernels.h"
#include "numbers.h"

#define PRECIS_INLINE inline __attribute__((always_inline))
#define PRECIS_NOINLINE __attribute__((noinline))
#define PRECIS_UNROLL _Pragma("GCC unroll 16")
