/* codec_neon.cpp: the codec for 64-bit ARM, the same bytes as every other set, and the three kernel sets that share it:
 * their attention differs in the instruction that multiplies codes. */
#define XQ_SET neon
#define XQ_SET_NEON
#include "codec_seal.h"

#include "cpu_features.h"

namespace xq {

void attend_neon(const xq_attention &args);
void attend_neon_dotprod(const xq_attention &args);
void attend_neon_i8mm(const xq_attention &args);

static std::atomic<uint64_t> calls, calls_dotprod, calls_i8mm;

const kernel_set kernels_neon = {
    "neon",         [] { return true; }, neon::pack,      neon::unpack,   neon::seal_k, neon::seal_v,
    neon::unseal_k, neon::unseal_v,      neon::predict_v, neon::hadamard, attend_neon,  &calls,
};

const kernel_set kernels_neon_dotprod = {
    "neon-dotprod", has_dotprod,    neon::pack,      neon::unpack,   neon::seal_k,        neon::seal_v,
    neon::unseal_k, neon::unseal_v, neon::predict_v, neon::hadamard, attend_neon_dotprod, &calls_dotprod,
};

const kernel_set kernels_neon_i8mm = {
    "neon-i8mm",    has_i8mm,       neon::pack,      neon::unpack,   neon::seal_k,     neon::seal_v,
    neon::unseal_k, neon::unseal_v, neon::predict_v, neon::hadamard, attend_neon_i8mm, &calls_i8mm,
};

} // namespace xq
