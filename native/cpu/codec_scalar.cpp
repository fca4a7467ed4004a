/* codec_scalar.cpp: the kernel set that runs everywhere; its attention is exact. */
#define XQ_SET scalar
#include "codec_seal.h"

namespace xq {

void attend_scalar(const xq_attention &args);

static std::atomic<uint64_t> calls;

const kernel_set kernels_scalar = {
    "scalar",         [] { return true; }, scalar::pack,      scalar::unpack,   scalar::seal_k, scalar::seal_v,
    scalar::unseal_k, scalar::unseal_v,    scalar::predict_v, scalar::hadamard, attend_scalar,  &calls,
};

} // namespace xq
