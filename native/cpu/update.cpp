/* update.cpp: the verb that changes pages: makes them smaller or larger, or writes the rows of a micro-batch.
 *
 * A task is one side of one KV head of a move, or one side of a token; nothing is shared between tasks but the counter.
 * The task that seals a page refills its slot.
 * At most 65 KiB of a thread's stack are used.
 */
#include "verbs.h"

#include <cstring>

namespace xq {

/* The rows that move into the slot of a page which is smaller now. */
static void refill_slot(const xq_store &store, const page_move &move, const side_view &side) {
    if (is_refilled(store, move)) {
        memcpy(slot_rows(side, move.slot), slot_rows(side, move.refill),
               (size_t)XQ_PAGE * (size_t)side.width * sizeof(uint16_t));
    }
}

/* From rows to bytes or codes, or from bytes to codes.  Returns how many inputs were not finite. */
static int make_smaller(const kernel_set &set, const page_side &x, const page_move &move, bool is_k) {
    if (is_bytes(move.slot)) {
        const byte_page from = bytes_at(x.side, is_k, move.slot);
        return is_k ? set.seal_k_bytes(x.page, from, move.valid)
                    : set.seal_v_bytes(x.page, from, move.valid, x.predicted);
    }
    const uint16_t *rows = slot_rows(x.side, move.slot);
    if (is_bytes(move.small)) {
        return set.shrink(bytes_at(x.side, is_k, move.small), rows, x.side.width, move.valid);
    }
    return is_k ? set.seal_k(x.page, rows, x.side.width, move.valid)
                : set.seal_v(x.page, rows, x.side.width, move.valid, x.predicted);
}

/* The way back. */
static void make_larger(const kernel_set &set, const page_side &x, const page_move &move, bool is_k) {
    uint16_t *rows = slot_rows(x.side, move.slot);
    if (is_bytes(move.small)) {
        set.widen(bytes_at(x.side, is_k, move.small), rows, x.side.width);
    } else if (is_k) {
        set.unseal_k(x.page, rows, x.side.width);
    } else {
        set.unseal_v(x.page, rows, x.side.width, x.predicted);
    }
}

/* Returns how many inputs were not finite. */
static int move_page(const kernel_set &set, const xq_store &store, const page_move &move, bool is_k, int head,
                     bool seals) {
    const page_side x(store, is_k, move.stream, move.page, head);
    if (!seals) {
        make_larger(set, x, move, is_k);
        return 0;
    }
    const int n_bad = make_smaller(set, x, move, is_k);
    refill_slot(store, move, x.side);
    return n_bad;
}

/* All KV heads of one side of a token. */
static int write_token(const kernel_set &set, const xq_store &store, const xq_update_args &args, bool is_k, int token) {
    const int width = side_of(store, is_k).width;
    int n_bad = 0;
    for (int head = 0; head < store.n_head_kv; ++head) {
        n_bad += set.to_half(new_row(args, is_k, token, head), width, row_at(store, is_k, head, args.rows[token]));
    }
    return n_bad;
}

static bool accepts_rows(const xq_store &store, const xq_update_args &args) {
    for (int32_t t = 0; t < args.n_tokens; ++t) {
        if (!is_row(store, args.rows[t])) {
            return !fail(XQ_ERR_ARGUMENT, "update: rows[%d] is %d, must be 0 to %lld", t, args.rows[t],
                         (long long)count_rows(store) - 1);
        }
    }
    return true;
}

int cpu_update(const xq_store *store, const xq_update_args *args, const xq_exec *exec) {
    if (!accepts_update(store, args) || !accepts_exec("update", exec) ||
        !in_range("update on a CPU", {{"rotate", args->rotate, 0, 0}}) ||
        !accepts_moves("update", *store, "seals", args->seals, args->n_seals, moves_seal) ||
        !accepts_moves("update", *store, "unseals", args->unseals, args->n_unseals, moves_unseal) ||
        !accepts_rows(*store, *args)) {
        return XQ_ERR_ARGUMENT;
    }
    const kernel_set *set = active_kernels();
    if (!set) {
        return XQ_ERR_KERNELS;
    }
    uint64_t n_bad = 0;
    const int sides = n_sides(*store), parts = sides * store->n_head_kv; // of a page
    each_task(*set, *exec, ((int64_t)args->n_seals + args->n_unseals) * parts, [&](int64_t task) {
        const int number = (int)(task / parts), part = (int)(task % parts);
        const bool seals = number < args->n_seals;
        const page_move &move = seals ? move_at(args->seals, number) : move_at(args->unseals, number - args->n_seals);
        if (move.slot != XQ_SLOT_NONE) {
            n_bad += (uint64_t)move_page(*set, *store, move, part % sides == 0, part / sides, seals);
        }
    });
    if (args->serial && exec->ith == 0) {
        *args->done = *args->serial;
    }
    each_task(*set, *exec, sides * (int64_t)args->n_tokens, [&](int64_t task) {
        n_bad += (uint64_t)write_token(*set, *store, *args, task % sides == 0, (int)(task / sides));
    });
    if (n_bad > 0) {
        __atomic_fetch_add(args->n_nonfinite, n_bad, __ATOMIC_RELAXED);
    }
    return XQ_OK;
}

} // namespace xq
