/* attention_neon_dotprod.cpp: attention for CPUs with dotprod: Cortex-A55, Cortex-A76, Apple M1 and later. */
#define XQ_SET dotprod_attention
#define XQ_NEON_DOTPROD
#include "attention_neon.h"

namespace xq {

void attend_neon_dotprod(const xq_attention &args) {
    attend<dotprod_attention::neon_set>(args);
}

} // namespace xq
