/* keys.cpp: the two ends of a context shift: keys of a few pages as F32, and stored again as they were: codes,
 * bytes or rows.
 *
 * Both ways keys are rounded to F16, as everything is that is stored.  A task is one KV head of one page.  At most
 * 20 KiB of a thread's stack are used.
 */
#include "verbs.h"

namespace xq {

/* Calls f(kernel set, move, its number, head) for this thread's share. */
template <typename F>
static int each_page(const char *verb, const xq_store *store, const xq_keys_args *args, const xq_exec *exec,
                     const F &f) {
    if (!accepts_keys(verb, store, args) || !accepts_exec(verb, exec) ||
        !accepts_moves(verb, *store, "pages", args->pages, args->n_pages, moves_keys)) {
        return XQ_ERR_ARGUMENT;
    }
    const kernel_set *set = active_kernels();
    if (!set) {
        return XQ_ERR_KERNELS;
    }
    const int64_t n_heads = store->n_head_kv;
    each_task(*set, *exec, args->n_pages * n_heads, [&](int64_t task) {
        const int number = (int)(task / n_heads);
        f(*set, move_at(args->pages, number), number, (int)(task % n_heads));
    });
    return XQ_OK;
}

int cpu_read_keys(const xq_store *store, const xq_keys_args *args, const xq_exec *exec) {
    const auto read = [&](const kernel_set &set, const page_move &move, int number, int head) {
        const page_side x(*store, true, move.stream, move.page, head);
        if (move.slot == XQ_SLOT_SEALED) {
            set.unseal_keys(x.page, key_at(*args, number, 0, head), args->token_stride / (int64_t)sizeof(float));
            return;
        }
        if (is_bytes(move.slot)) {
            set.widen_keys(bytes_at(x.side, true, move.slot), key_at(*args, number, 0, head),
                           args->token_stride / (int64_t)sizeof(float));
            return;
        }
        for (int t = 0; t < XQ_PAGE; ++t) {
            set.to_float(slot_rows(x.side, move.slot) + t * x.side.width, x.side.width, key_at(*args, number, t, head));
        }
    };
    return each_page("read_keys", store, args, exec, read);
}

int cpu_write_keys(const xq_store *store, const xq_keys_args *args, const xq_exec *exec) {
    const auto write = [&](const kernel_set &set, const page_move &move, int number, int head) {
        const page_side x(*store, true, move.stream, move.page, head);
        if (move.slot == XQ_SLOT_SEALED) {
            set.seal_keys(x.page, key_at(*args, number, 0, head), args->token_stride / (int64_t)sizeof(float),
                          move.valid);
            return;
        }
        if (is_bytes(move.slot)) {
            set.shrink_keys(bytes_at(x.side, true, move.slot), key_at(*args, number, 0, head),
                            args->token_stride / (int64_t)sizeof(float), move.valid);
            return;
        }
        for (int t = 0; t < XQ_PAGE; ++t) {
            set.to_half(key_at(*args, number, t, head), x.side.width, slot_rows(x.side, move.slot) + t * x.side.width);
        }
    };
    return each_page("write_keys", store, args, exec, write);
}

} // namespace xq
