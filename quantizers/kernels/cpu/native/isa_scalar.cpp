// The portable kernels, which every processor runs and the others are measured against.
#define PRECIS_PORTABLE
#include "isa.h"

#define PRECIS_ISA "scalar"

namespace precis {
namespace {
#include "simd_scalar.h"
#include "kernels.inc"
}  // namespace

const Kernels& scalar_kernels() { return kTable; }

}  // namespace precis
