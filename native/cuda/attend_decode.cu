/* attend_decode.cu: which layers the tensor-core kernel covers, and which instance of it they take. */
#include "attend_decode.cuh"

#include <algorithm>

namespace xq {

// each has a file of its own: they compile side by side
extern template int launch_decode_of<128, true, 1>(const xq_store &, const xq_attend_args &, cudaStream_t);
extern template int launch_decode_of<128, true, 2>(const xq_store &, const xq_attend_args &, cudaStream_t);
extern template int launch_decode_of<128, false, 2>(const xq_store &, const xq_attend_args &, cudaStream_t);
extern template int launch_decode_of<64, true, 1>(const xq_store &, const xq_attend_args &, cudaStream_t);
extern template int launch_decode_of<64, true, 2>(const xq_store &, const xq_attend_args &, cudaStream_t);
extern template int launch_decode_of<64, false, 2>(const xq_store &, const xq_attend_args &, cudaStream_t);

static_assert(n_rows<2> == XQ_CUDA_GROUP_ROWS, "a tile has a counter of arrivals");

template <int E, int R> static decode_shape shape_of(const xq_store &store) {
    decode_shape shape = {};
    shape.parts = staging(store);
    constexpr int size = warp_place<E>::size;
    const int page = shape.parts.bytes, limit = shared_limit() - (int)sizeof(page_list) - 6144;
    for (int n = max_warps(R, store.k.plan.bits + store.v.plan.bits) / size; n > 0 && shape.n_teams == 0; --n) {
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

decode_shape decode_shape_of(const xq_store &store, int rows_of_lane) {
    if (rows_of_lane == 1) {
        return store.v.width == 128 ? shape_of<128, 1>(store) : shape_of<64, 1>(store);
    }
    return store.v.width == 128 ? shape_of<128, 2>(store) : shape_of<64, 2>(store);
}

bool decode_covers(const xq_store &store) {
    return is_narrow(store.k.plan, store.v.plan, store.k.width, store.v.width) && !store.mapped && !store.latent &&
           decode_shape_of(store, 2).n_teams > 0;
}

template <int D>
static int launch_width(bool plain, const xq_store &store, const xq_attend_args &args, cudaStream_t stream) {
    if (!plain) {
        return launch_decode_of<D, false, 2>(store, args, stream);
    }
    return args.n_tokens == 1 && args.n_head / store.n_head_kv <= 4 ? launch_decode_of<D, true, 1>(store, args, stream)
                                                                    : launch_decode_of<D, true, 2>(store, args, stream);
}

int launch_decode(const xq_store &store, const xq_attend_args &args, cudaStream_t stream) {
    const xq_side &k = store.k.plan, &v = store.v.plan;
    const bool plain = k.group == XQ_PAGE && k.param == XQ_PARAM_F16 && v.param == XQ_PARAM_LOG8 &&
                       args.softcap <= 0.0f && args.max_bias <= 0.0f;
    return store.k.width == 128 ? launch_width<128>(plain, store, args, stream)
                                : launch_width<64>(plain, store, args, stream);
}

} // namespace xq
