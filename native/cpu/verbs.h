/* verbs.h: what the CPU's five verbs share: how threads share the work, and checks of what lies behind pointers. */
#pragma once

#include "check.h"
#include "kernels.h"

namespace xq {

int cpu_update(const xq_store *store, const xq_update_args *args, const xq_exec *exec);
int cpu_attend(const xq_store *store, const xq_attend_args *args, const xq_exec *exec);
int cpu_unpack(const xq_store *store, const xq_unpack_args *args, const xq_exec *exec);
int cpu_read_keys(const xq_store *store, const xq_keys_args *args, const xq_exec *exec);
int cpu_write_keys(const xq_store *store, const xq_keys_args *args, const xq_exec *exec);

/* Every thread makes the same checks of the same data: all of them refuse a call, or none. */
bool accepts_exec(const char *verb, const xq_exec *exec);
/* What moves [n][XQ_MOVE_WORDS] are for, which says what slot, refill and small may be. */
enum moves_kind { moves_seal, moves_unseal, moves_keys };
bool accepts_moves(const char *verb, const xq_store &store, const char *name, const int32_t *moves, int32_t n,
                   moves_kind kind);
/* The streams, and the slots of their first n_kv_pages pages. */
bool accepts_table(const char *verb, const xq_store &store, const int32_t *table, const int32_t *first_stream,
                   int32_t n_streams, int32_t n_kv_pages);

/* Calls f(task) for this thread's tasks of n, every nth one, and counts them as calls of the kernel set. */
template <typename F> void each_task(const kernel_set &set, const xq_exec &exec, int64_t n, const F &f) {
    uint64_t n_calls = 0;
    for (int64_t task = exec.ith; task < n; task += exec.nth, ++n_calls) {
        f(task);
    }
    if (n_calls > 0) {
        set.calls->fetch_add(n_calls, std::memory_order_relaxed);
    }
}

/* One side of a page of a KV head as codes, with what a map says of it. */
struct page_side {
    side_view side, source_side;
    sealed_side page, source;
    prediction predicted;

    page_side(const xq_store &store, bool is_k, int stream, int number, int head)
        : side(side_at(side_of(store, is_k), stream, head)),
          source_side(store.mapped && !is_k ? source_at(store, stream, head) : side),
          page{side.plan, side.width, page_codes(side, number), page_param(side, number)},
          source{source_side.plan, source_side.width, page_codes(source_side, number), page_param(source_side, number)},
          predicted{} {
        if (store.mapped && !is_k) {
            predicted = {nullptr, &source, map_of(store, head)};
        }
    }
    page_side(const page_side &) = delete; // page and source refer to the sides beside them
    page_side &operator=(const page_side &) = delete;
};

} // namespace xq
