/* cpu_features.h: what this CPU has and this operating system saves.  Implemented in dispatch.cpp, without vector code.
 */
#pragma once

namespace xq {

bool has_avx2();    /* AVX2, FMA and F16C */
bool has_avxvnni(); /* AVX-VNNI, and the above */
bool has_avx512();  /* AVX-512 F, BW, DQ, VL and VNNI, AVX2, FMA and F16C */
bool has_dotprod(); /* ARM: sdot */
bool has_i8mm();    /* ARM: smmla, and sdot */

} // namespace xq
