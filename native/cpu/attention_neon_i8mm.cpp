/* attention_neon_i8mm.cpp: attention for ARM CPUs with the i8mm extension (Armv8.6: Neoverse V1, Cortex-A510, Apple M2
 * and later). */
#define XQ_SET i8mm_attention
#define XQ_NEON_DOTPROD
#define XQ_NEON_I8MM
#include "attention_neon.h"

namespace xq {

void attend_neon_i8mm(const xq_attention &args) {
    attend<i8mm_attention::neon_set>(args);
}

} // namespace xq
