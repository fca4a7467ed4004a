/* codec_neon.cpp: the codec for 64-bit ARM, the same bytes as every other set, and the three kernel sets that share it:
 * their attention differs in the instruction that multiplies codes. */
#define XQ_SET_NEON
#include "codec_seal.h"

#include "cpu_features.h"

namespace xq {

void attend_neon(const attention &args);
void attend_neon_dotprod(const attention &args);
void attend_neon_i8mm(const attention &args);

static std::atomic<uint64_t> calls, calls_dotprod, calls_i8mm;

static bool always() {
    return true;
}

constexpr kernel_set kernels_neon = codec_and(attend_neon, "neon", always, &calls);
constexpr kernel_set kernels_neon_dotprod = codec_and(attend_neon_dotprod, "neon-dotprod", has_dotprod, &calls_dotprod);
constexpr kernel_set kernels_neon_i8mm = codec_and(attend_neon_i8mm, "neon-i8mm", has_i8mm, &calls_i8mm);

} // namespace xq
