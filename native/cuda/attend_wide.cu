/* attend_wide.cu: which layers the wide kernel covers, and which instance of it they take. */
#include "attend_wide.cuh"
#include "solo_shape.h"

#include <algorithm>

namespace xq {

// each pair has a file of its own: they compile side by side
extern template int launch_wide_of<4, 2, 1, false>(const xq_store &, const xq_attend_args &, const wide_call &,
                                                   cudaStream_t);
extern template int launch_wide_of<4, 2, 2, false>(const xq_store &, const xq_attend_args &, const wide_call &,
                                                   cudaStream_t);
extern template int launch_wide_of<4, 2, 1, true>(const xq_store &, const xq_attend_args &, const wide_call &,
                                                  cudaStream_t);
extern template int launch_wide_of<4, 2, 2, true>(const xq_store &, const xq_attend_args &, const wide_call &,
                                                  cudaStream_t);
extern template int launch_wide_of<4, 4, 1, false>(const xq_store &, const xq_attend_args &, const wide_call &,
                                                   cudaStream_t);
extern template int launch_wide_of<4, 4, 2, false>(const xq_store &, const xq_attend_args &, const wide_call &,
                                                   cudaStream_t);
extern template int launch_wide_of<4, 4, 1, true>(const xq_store &, const xq_attend_args &, const wide_call &,
                                                  cudaStream_t);
extern template int launch_wide_of<4, 4, 2, true>(const xq_store &, const xq_attend_args &, const wide_call &,
                                                  cudaStream_t);
extern template int launch_wide_of<8, 4, 1, false>(const xq_store &, const xq_attend_args &, const wide_call &,
                                                   cudaStream_t);
extern template int launch_wide_of<8, 4, 2, false>(const xq_store &, const xq_attend_args &, const wide_call &,
                                                   cudaStream_t);
extern template int launch_wide_of<8, 4, 1, true>(const xq_store &, const xq_attend_args &, const wide_call &,
                                                  cudaStream_t);
extern template int launch_wide_of<8, 4, 2, true>(const xq_store &, const xq_attend_args &, const wide_call &,
                                                  cudaStream_t);

static int logarithm(int n) {
    int log = 0;
    for (; 1 << log < n; ++log) {
    }
    return log;
}

wide_call wide_call_of(const xq_store &store, bool latent) {
    const xq_side &k = store.k.plan, &v = store.v.plan;
    const int width = store.k.width, length = group_length(v, store.v.width);
    wide_call call = {};
    call.parts = staging(store, latent);
    call.width = latent ? store.latent : store.v.width;
    call.first_channel = latent ? 0 : store.latent;
    call.rotate = !latent && v.rotate;
    call.k_low = low_part(k.bits, width), call.k_high = high_part(width);
    call.k_column = column_bytes(k.bits, width);
    call.k_param = parameter_bytes(k, width);
    if (!latent) { // else v may say nothing
        call.v_low = low_part(v.bits, XQ_PAGE), call.v_high = high_part(XQ_PAGE);
        call.v_column = column_bytes(v.bits, XQ_PAGE);
        call.v_param = parameter_bytes(v, XQ_PAGE);
    }
    call.tiles = XQ_PAGE / k.group;
    call.log_tile = logarithm(k.group);
    call.n_groups = latent || length == store.v.width ? 0 : store.v.width / length;
    call.log_group = logarithm(length);
    call.n_shares =
        latent ? (units_of(call.k_low.bits, call.width) + 7) / 8 * call.k_low.planes : (call.width + 31) / 32;
    return call;
}

static_assert(wide_rows<2> == XQ_CUDA_WIDE_ROWS, "parts are counted for so many rows a block");

/* Warps of a team, and tiles of 16 channels of each. */
static int team_size(int shares) {
    return shares <= 8 ? 4 : 8;
}
static int tiles_of(int shares) {
    return shares <= 4 ? 2 : 4;
}

/* n_pages: of a part.  n_teams = 0: nothing fits. */
template <int NT> static wide_call shape_of(const xq_store &store, bool latent, int n_pages) {
    const xq_side &k = store.k.plan, &v = store.v.plan;
    wide_call call = wide_call_of(store, latent);
    const int W = team_size(call.n_shares), rows = wide_rows<NT>;
    const int warps = tiles_of(call.n_shares) == 2 ? wide_warps<4, 2, NT>
                      : W == 4                     ? wide_warps<4, 4, NT>
                                                   : wide_warps<8, 4, NT>;
    call.state = state_bytes<NT>(call.width);
    call.folded = products_of(k.bits, store.k.width) * product_bytes<NT>;
    const int p = (!latent && v.bits == 3 ? 2 : 1) * page_products * product_bytes<NT>;
    call.scales = std::max(call.tiles * call.folded, p);
    call.constants = call.scales + 2 * call.n_groups * (2 * XQ_PAGE);
    call.tops = call.constants + call.tiles * W * rows * (int)sizeof(float);
    call.room = aligned(call.tops + 2 * rows * (int)sizeof(int) + W * rows * (int)sizeof(float2));
    const int list = aligned(n_pages * (2 * (int)sizeof(int) + 1)), reserve = 1024; // static shared memory
    for (int n = warps / W; n > 0 && call.n_teams == 0; --n) {
        const int room = shared_limit() - reserve - call.folded - n * call.room - list;
        const int depth = std::min(room / (n * call.parts.bytes), max_buffers / n);
        call.ring = aligned(std::max(depth * call.parts.bytes, 2 * call.state));
        if (depth >= 2 && n * call.ring <= room) {
            call.n_teams = n;
            call.depth = depth;
            call.queries = n * call.ring;
            call.rooms = call.queries + call.folded;
            call.list = call.rooms + n * call.room;
            call.shared = call.list + list;
        }
    }
    return call;
}

/* One kind of a layer's values, whatever number of pages a part has. */
static bool covers(const xq_store &store, const xq_side &side, bool latent, int width) {
    return width == 0 || (side.bits >= 1 && side.bits <= 4 && width <= max_wide_width &&
                          shape_of<1>(store, latent, XQ_CUDA_PART_PAGES).n_teams > 0);
}

bool wide_covers(const xq_store &store) {
    return !store.mapped && store.k.plan.bits >= 1 && covers(store, store.k.plan, true, store.latent) &&
           covers(store, store.v.plan, false, store.v.width);
}

template <int NT, bool LATENT>
static int launch_rows(const xq_store &store, const xq_attend_args &args, wide_call &call, cudaStream_t stream) {
    call.count(store, args, wide_rows<NT>);
    const int status = tiles_of(call.n_shares) == 2    ? launch_wide_of<4, 2, NT, LATENT>(store, args, call, stream)
                       : team_size(call.n_shares) == 4 ? launch_wide_of<4, 4, NT, LATENT>(store, args, call, stream)
                                                       : launch_wide_of<8, 4, NT, LATENT>(store, args, call, stream);
    return status != XQ_OK ? status : launch_merge_wide(store, args, call.first_channel, call.width, stream);
}

/* Sixteen query rows a block, if there are more than eight and if that fits. */
template <bool LATENT> static int launch_kind(const xq_store &store, const xq_attend_args &args, cudaStream_t stream) {
    if (!LATENT && solo_covers(store, args)) {
        return launch_solo(store, args, stream);
    }
    const int n_pages = (args.n_kv_pages + args.n_parts - 1) / args.n_parts;
    if (args.n_tokens * (args.n_head / store.n_head_kv) > wide_rows<1>) {
        wide_call call = shape_of<2>(store, LATENT, n_pages);
        if (call.n_teams > 0) {
            return launch_rows<2, LATENT>(store, args, call, stream);
        }
    }
    wide_call call = shape_of<1>(store, LATENT, n_pages);
    return launch_rows<1, LATENT>(store, args, call, stream);
}

/* Values that are channels of keys, and others: if there are both, one launch each. */
int launch_wide(const xq_store &store, const xq_attend_args &args, cudaStream_t stream) {
    int status = XQ_OK;
    xq_attend_args rest = args;
    if (store.latent > 0) {
        status = launch_kind<true>(store, args, stream);
        rest.after_update = 0; // the launch before is no update
    }
    return status == XQ_OK && store.v.width > 0 ? launch_kind<false>(store, rest, stream) : status;
}

} // namespace xq
