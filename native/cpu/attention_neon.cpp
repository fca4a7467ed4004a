/* attention_neon.cpp: attention for any 64-bit ARM CPU. */
#define XQ_SET neon_attention
#include "attention_neon.h"

namespace xq {

void attend_neon(const xq_attention &args) {
    attend<neon_attention::neon_set>(args);
}

} // namespace xq
