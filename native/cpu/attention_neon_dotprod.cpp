/* attention_neon_dotprod.cpp: attention for CPUs with dotprod: Cortex-A55, Cortex-A76, Apple M1 and later. */
#define XQ_NEON_DOTPROD
#include "attention_neon.h"

namespace xq {

void attend_neon_dotprod(const attention &args) {
    attend<neon_set>(args);
}

} // namespace xq
