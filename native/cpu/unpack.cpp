/* unpack.cpp: the verb that gives pages as F16 rows again.
 *
 * A task is one KV head of one page.  At most 65 KiB of a thread's stack are used.
 */
#include "verbs.h"

#include <cstring>

namespace xq {

static void unpack_page(const kernel_set &set, const xq_store &store, const xq_unpack_args &args, int nth_stream,
                        int page, int nth_head) {
    const bool is_k = args.is_k != 0;
    const int stream = stream_of(args.first_stream, nth_stream);
    const int32_t slot = table_of(store, args.table, stream)[page];
    const page_side x(store, is_k, stream, page, args.first_head + nth_head);
    const int64_t width = x.side.width, stride = args.n_heads * width;
    uint16_t *out = unpacked_row(store, args, nth_stream, page, 0, nth_head);
    if (slot == XQ_SLOT_SEALED) {
        if (is_k) {
            set.unseal_k(x.page, out, stride);
        } else {
            set.unseal_v(x.page, out, stride, x.predicted);
        }
        return;
    }
    if (is_bytes(slot)) {
        set.widen(bytes_at(x.side, is_k, slot), out, stride);
        return;
    }
    for (int t = 0; t < XQ_PAGE; ++t, out += stride) {
        if (slot == XQ_SLOT_NONE) {
            memset(out, 0, (size_t)width * sizeof(*out));
        } else {
            memcpy(out, slot_rows(x.side, slot) + t * width, (size_t)width * sizeof(*out));
        }
    }
}

int cpu_unpack(const xq_store *store, const xq_unpack_args *args, const xq_exec *exec) {
    if (!accepts_unpack(store, args) || !accepts_exec("unpack", exec) ||
        !accepts_table("unpack", *store, args->table, args->first_stream, args->n_streams, args->n_kv_pages)) {
        return XQ_ERR_ARGUMENT;
    }
    const kernel_set *set = active_kernels();
    if (!set) {
        return XQ_ERR_KERNELS;
    }
    const int64_t n_heads = args->n_heads, n_pages = args->n_kv_pages;
    each_task(*set, *exec, args->n_streams * n_pages * n_heads, [&](int64_t task) {
        unpack_page(*set, *store, *args, (int)(task / n_heads / n_pages), (int)(task / n_heads % n_pages),
                    (int)(task % n_heads));
    });
    return XQ_OK;
}

} // namespace xq
