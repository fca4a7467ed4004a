/* attend_solo.cu: which launches the kernel of warps that do not wait covers, and which instance of it they take. */
#include "attend_solo.cuh"

#include <algorithm>

namespace xq {

// each has a file of its own: they compile side by side
extern template int launch_solo_of<256, 1>(const xq_store &, const xq_attend_args &, const wide_call &, cudaStream_t);
extern template int launch_solo_of<256, 2>(const xq_store &, const xq_attend_args &, const wide_call &, cudaStream_t);
extern template int launch_solo_of<512, 1>(const xq_store &, const xq_attend_args &, const wide_call &, cudaStream_t);

/* depth = 0: it does not fit. */
template <int E, int NT> static wide_call shape_of(const xq_store &store, const xq_attend_args &args) {
    constexpr int rows = wide_rows<NT>, n_teams = solo_warps / solo_team<E>;
    wide_call call = wide_call_of(store, false);
    call.count(store, args, rows);
    call.state = state_bytes<NT>(E);
    call.room = solo_warps * NT * 32 * (int)sizeof(float4);
    call.folded = products_of(store.k.plan.bits, E) * product_bytes<NT>;
    const int words = (args.n_kv_pages + 31) / 32, reserve = 1024; // static shared memory
    const int list = aligned(call.n_pages * ((int)sizeof(int) + 1) + words * (int)sizeof(uint32_t));
    const int room = shared_limit() - reserve - call.folded - call.room - list, page = call.parts.bytes;
    const int depth = std::min(room / (n_teams * page), max_buffers / n_teams);
    if (depth >= 2) {
        call.depth = depth;
        call.queries = aligned(std::max(n_teams * depth * page, solo_warps * call.state));
        call.rooms = call.queries + call.folded;
        call.list = call.rooms + call.room;
        call.shared = call.list + list;
    }
    return call;
}

/* Query rows of a block, in tiles of eight; 0: no instance. */
static int tiles_of_rows(const xq_store &store, const xq_attend_args &args) {
    const int n_rep = args.n_head / store.n_head_kv;
    return n_rep <= wide_rows<1> ? 1 : store.k.width == 256 ? 2 : 0;
}

static wide_call shape_for(const xq_store &store, const xq_attend_args &args) {
    return store.k.width == 512              ? shape_of<512, 1>(store, args)
           : tiles_of_rows(store, args) == 1 ? shape_of<256, 1>(store, args)
                                             : shape_of<256, 2>(store, args);
}

bool solo_covers(const xq_store &store, const xq_attend_args &args) {
    const xq_side &k = store.k.plan, &v = store.v.plan;
    const int width = store.k.width;
    return can_launch_early() && args.n_tokens == 1 && store.latent == 0 && (width == 256 || width == 512) &&
           store.v.width == width && has_solo_bits(k.bits, v.bits) && k.group == XQ_PAGE && k.param == XQ_PARAM_F16 &&
           v.param == XQ_PARAM_LOG8 && group_length(v, width) == width && args.softcap <= 0.0f &&
           args.max_bias <= 0.0f && tiles_of_rows(store, args) > 0 && shape_for(store, args).depth > 0;
}

int launch_solo(const xq_store &store, const xq_attend_args &args, cudaStream_t stream) {
    const wide_call call = shape_for(store, args);
    const int status = store.k.width == 512              ? launch_solo_of<512, 1>(store, args, call, stream)
                       : tiles_of_rows(store, args) == 1 ? launch_solo_of<256, 1>(store, args, call, stream)
                                                         : launch_solo_of<256, 2>(store, args, call, stream);
    return status != XQ_OK ? status : launch_merge_wide(store, args, 0, call.width, stream);
}

} // namespace xq
