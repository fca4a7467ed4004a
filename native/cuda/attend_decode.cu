/* attend_decode.cu: which layers the tensor-core kernel covers, and which instance of it they take. */
#include "attend_page.cuh"
#include "launch.h"
#include "stage.cuh"

namespace xq {

template <int D, bool PLAIN>
int launch_decode_of(const xq_cuda_layer &l, const xq_cuda_attend_args &a, cudaStream_t stream);

bool decode_covers(const xq_cuda_layer &l) {
    const xq_side &k = l.plan.k, &v = l.plan.v;
    return (l.d == 64 || l.d == 128) && l.e == l.d && k.bits >= 1 && k.bits <= 4 && (v.bits == 2 || v.bits == 1) &&
           (v.group == 0 || v.group >= l.e) && !l.mapped && decode_shared_bytes(l) <= shared_limit();
}

int launch_decode(const xq_cuda_layer &l, const xq_cuda_attend_args &a, cudaStream_t stream) {
    const bool plain =
        l.plan.k.group == XQ_PAGE && l.plan.k.param == XQ_PARAM_F16 && a.softcap <= 0.0f && a.max_bias <= 0.0f;
    if (l.d == 128) {
        return plain ? launch_decode_of<128, true>(l, a, stream) : launch_decode_of<128, false>(l, a, stream);
    }
    return plain ? launch_decode_of<64, true>(l, a, stream) : launch_decode_of<64, false>(l, a, stream);
}

} // namespace xq
