/* attention_neon.cpp: attention for any 64-bit ARM CPU. */
#include "attention_neon.h"

namespace xq {

void attend_neon(const attention &args) {
    attend<neon_set>(args);
}

} // namespace xq
