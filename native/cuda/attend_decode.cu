/* attend_decode.cu: which layers the tensor-core kernel covers, and which instance of it they take. */
#include "attend_decode.cuh"

#include <algorithm>

namespace xq {

// each has a file of its own: they compile side by side
extern template int launch_decode_of<128, true>(const xq_cuda_layer &, const xq_cuda_attend_args &, cudaStream_t);
extern template int launch_decode_of<128, false>(const xq_cuda_layer &, const xq_cuda_attend_args &, cudaStream_t);
extern template int launch_decode_of<64, true>(const xq_cuda_layer &, const xq_cuda_attend_args &, cudaStream_t);
extern template int launch_decode_of<64, false>(const xq_cuda_layer &, const xq_cuda_attend_args &, cudaStream_t);

decode_shape decode_shape_of(const xq_cuda_layer &l) {
    decode_shape shape = {staging(l, page_p::bytes)};
    const int page = shape.at.bytes, limit = shared_limit() - (int)sizeof(page_list) - 1024;
    shape.n_warps = std::min(max_warps, limit / (page + piece_p::bytes));
    const int p = shape.n_warps * piece_p::bytes, fit = std::min((limit - p) / page, max_buffers);
    shape.n_buffers = can_launch_early() || shape.n_warps == 0 ? fit : std::min(fit / shape.n_warps, 2) * shape.n_warps;
    const int states = l.e == 128 ? joined_bytes<128>(shape.n_warps) : joined_bytes<64>(shape.n_warps);
    shape.shared = std::max(shape.n_buffers * page + p, states);
    return shape;
}

bool decode_covers(const xq_cuda_layer &l) {
    const xq_side &k = l.plan.k, &v = l.plan.v;
    return (l.d == 64 || l.d == 128) && l.e == l.d && k.bits >= 1 && k.bits <= 4 && (v.bits == 2 || v.bits == 1) &&
           (v.group == 0 || v.group >= l.e) && !l.mapped && decode_shape_of(l).n_warps > 0;
}

int launch_decode(const xq_cuda_layer &l, const xq_cuda_attend_args &a, cudaStream_t stream) {
    const bool plain = l.plan.k.group == XQ_PAGE && l.plan.k.param == XQ_PARAM_F16 && l.plan.v.param == XQ_PARAM_LOG8 &&
                       a.softcap <= 0.0f && a.max_bias <= 0.0f;
    if (l.d == 128) {
        return plain ? launch_decode_of<128, true>(l, a, stream) : launch_decode_of<128, false>(l, a, stream);
    }
    return plain ? launch_decode_of<64, true>(l, a, stream) : launch_decode_of<64, false>(l, a, stream);
}

} // namespace xq
