/* attention_avx2.cpp: attention for CPUs with AVX2: most since 2013. */
#include "attention_avx2.h"

namespace xq {

void attend_avx2(const attention &args) {
    attend<avx2_set>(args);
}

} // namespace xq
