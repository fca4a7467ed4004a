/* codec_avx2.cpp: the codec for AVX2 with F16C, which the AVX-512 set uses as well; the same bytes as every other set.
 */
#define XQ_SET_AVX2
#include "codec_seal.h"

#include "cpu_features.h"

namespace xq {

void attend_avx2(const attention &args);
void attend_avx512(const attention &args);

static std::atomic<uint64_t> calls, calls_512;

constexpr kernel_set kernels_avx2 = codec_and(attend_avx2, "avx2", has_avx2, &calls);
constexpr kernel_set kernels_avx512 = codec_and(attend_avx512, "avx512", has_avx512, &calls_512);

} // namespace xq
