/* attention_neon_i8mm.cpp: attention for CPUs with i8mm: Neoverse V1, Cortex-X2, Apple M2 and later. */
#define XQ_NEON_DOTPROD
#define XQ_NEON_I8MM
#include "attention_neon.h"

namespace xq {

void attend_neon_i8mm(const attention &args) {
    attend<neon_set>(args);
}

} // namespace xq
