/* attend_decode.cu: which layers the tensor-core kernel covers, and which instance of it they take. */
#include "attend_decode.cuh"

#include <algorithm>

namespace xq {

// each has a file of its own: they compile side by side
extern template int launch_decode_of<128, true, 1>(const xq_cuda_layer &, const xq_cuda_attend_args &, cudaStream_t);
extern template int launch_decode_of<128, true, 2>(const xq_cuda_layer &, const xq_cuda_attend_args &, cudaStream_t);
extern template int launch_decode_of<128, false, 2>(const xq_cuda_layer &, const xq_cuda_attend_args &, cudaStream_t);
extern template int launch_decode_of<64, true, 1>(const xq_cuda_layer &, const xq_cuda_attend_args &, cudaStream_t);
extern template int launch_decode_of<64, true, 2>(const xq_cuda_layer &, const xq_cuda_attend_args &, cudaStream_t);
extern template int launch_decode_of<64, false, 2>(const xq_cuda_layer &, const xq_cuda_attend_args &, cudaStream_t);

template <int E, int R> static decode_shape shape_of(const xq_cuda_layer &l) {
    decode_shape shape = {staging(l)};
    constexpr int size = team_warp<E>::size;
    const int page = shape.at.bytes, limit = shared_limit() - (int)sizeof(page_list) - 6144;
    for (int n = max_warps(R, l.plan.k.bits + l.plan.v.bits) / size; n > 0 && shape.n_teams == 0; --n) {
        const int n_open = std::min(max_open, n * size);
        const int before = (n_open * (int)sizeof(sums<E, R>) + n * room_bytes<R> + 127) / 128 * 128;
        // cp.async is waited for as far as the last page but one
        const int depth = std::min((limit - before) / (n * page), can_launch_early() ? max_buffers / n : 3);
        if (depth >= 2) {
            shape.n_teams = n;
            shape.depth = depth;
            shape.n_open = n_open;
            shape.buffers = before;
            shape.shared = before + std::max(n * depth * page, n * (int)sizeof(sums<E, R>));
        }
    }
    return shape;
}

decode_shape decode_shape_of(const xq_cuda_layer &l, int rows_of_lane) {
    if (rows_of_lane == 1) {
        return l.e == 128 ? shape_of<128, 1>(l) : shape_of<64, 1>(l);
    }
    return l.e == 128 ? shape_of<128, 2>(l) : shape_of<64, 2>(l);
}

bool decode_covers(const xq_cuda_layer &l) {
    const xq_side &k = l.plan.k, &v = l.plan.v;
    return (l.d == 64 || l.d == 128) && l.e == l.d && k.bits >= 1 && k.bits <= 4 && (v.bits == 2 || v.bits == 1) &&
           (v.group == 0 || v.group >= l.e) && !l.mapped && decode_shape_of(l, 2).n_teams > 0;
}

template <int D>
static int launch_width(bool plain, const xq_cuda_layer &l, const xq_cuda_attend_args &a, cudaStream_t stream) {
    if (!plain) {
        return launch_decode_of<D, false, 2>(l, a, stream);
    }
    return a.n_tokens == 1 && a.n_head / l.n_head_kv <= 4 ? launch_decode_of<D, true, 1>(l, a, stream)
                                                          : launch_decode_of<D, true, 2>(l, a, stream);
}

int launch_decode(const xq_cuda_layer &l, const xq_cuda_attend_args &a, cudaStream_t stream) {
    const bool plain = l.plan.k.group == XQ_PAGE && l.plan.k.param == XQ_PARAM_F16 && l.plan.v.param == XQ_PARAM_LOG8 &&
                       a.softcap <= 0.0f && a.max_bias <= 0.0f;
    return l.d == 128 ? launch_width<128>(plain, l, a, stream) : launch_width<64>(plain, l, a, stream);
}

} // namespace xq
