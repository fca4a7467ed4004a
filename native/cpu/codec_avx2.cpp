/* codec_avx2.cpp: the codec for AVX2 with F16C, the same bytes as every other set, and the three kernel sets that share
 * it. */
#define XQ_SET_AVX2
#include "codec_seal.h"

#include "cpu_features.h"

namespace xq {

void attend_avx2(const attention &args);
void attend_avxvnni(const attention &args);
void attend_avx512(const attention &args);

[[maybe_unused]] static std::atomic<uint64_t> calls, calls_vnni, calls_512;

constexpr kernel_set kernels_avx2 = codec_and(attend_avx2, "avx2", has_avx2, &calls);
#ifdef XQ_HAS_AVXVNNI
constexpr kernel_set kernels_avxvnni = codec_and(attend_avxvnni, "avxvnni", has_avxvnni, &calls_vnni);
#endif
constexpr kernel_set kernels_avx512 = codec_and(attend_avx512, "avx512", has_avx512, &calls_512);

} // namespace xq
