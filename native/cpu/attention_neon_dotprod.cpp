/* attention_neon_dotprod.cpp: attention for ARM CPUs with the dotprod extension (Armv8.2: Cortex-A55, A76 and later).
 */
#define XQ_SET dotprod_attention
#define XQ_NEON_DOTPROD
#include "attention_neon.h"

namespace xq {

void attend_neon_dotprod(const xq_attention &args) {
    attend<dotprod_attention::neon_set>(args);
}

} // namespace xq
