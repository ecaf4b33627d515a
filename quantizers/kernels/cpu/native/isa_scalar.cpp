// The portable kernels, which every processor runs and the others are measured against.
#define PRECIS_PORTABLE
#include "isa.h"

// More would unroll the loops over a vector's lanes: five times the compiler's time and four times the code, which is no quicker.
#pragma GCC optimize("O2")

#define PRECIS_ISA "scalar"

namespace precis {
namespace {
#include "simd_scalar.h"
#include "kernels.inc"
}  // namespace

const Kernels& scalar_kernels() { return kTable; }

}  // namespace precis
