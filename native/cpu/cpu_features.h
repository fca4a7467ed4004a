/* cpu_features.h: what this CPU has and this operating system lets programs use (on x86-64 it must save the registers:
 * XGETBV; on ARM it says so itself).  Without vector code, and without anything else of libxquant: native/llama chooses
 * llama.cpp's kernels by it as well.
 */
#pragma once

namespace xq {

bool has_sse42();
bool has_avx2(); /* AVX2, FMA and F16C */
bool has_bmi2();
bool has_avxvnni(); /* AVX-VNNI, and has_avx2() */
bool has_avx512();  /* AVX-512 F, BW, CD, DQ, VL and VNNI, and has_avx2() */
bool has_amx();     /* AMX of 8-bit integers, AVX-512 VBMI and BF16, and has_avx512() */
bool has_dotprod(); /* ARM: sdot */
bool has_fp16();    /* ARM: half precision in vectors */
bool has_i8mm();    /* ARM: smmla, and sdot */

} // namespace xq
