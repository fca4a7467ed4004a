/* attention_avxvnni.cpp: attention for CPUs with AVX-VNNI, of which those without AVX-512 take it: Intel's from Alder
 * Lake on. */
#define XQ_AVX_VNNI
#include "attention_avx2.h"

namespace xq {

void attend_avxvnni(const attention &args) {
    attend<avx2_set>(args);
}

} // namespace xq
