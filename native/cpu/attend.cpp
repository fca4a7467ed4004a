/* attend.cpp: the verb of attention: all heads, over open and sealed pages (attention_pages.h has the equations).
 *
 * A task is one part of the pages, for up to XQ_CPU_GROUP_ROWS query rows of one KV head: their states stay in the
 * caches while pages stream by.  The parts of a group of rows are merged by the thread whose part is the last to be
 * done, which the counter of the group tells it; nobody waits.  Parts are merged in their order, so that the result
 * does not depend on who was last.
 *
 * At most 95 KiB of a thread's stack are used.
 */
#include "verbs.h"

#include "alibi.h"

#include <algorithm>
#include <cmath>

namespace xq {

namespace {

/* Query rows of a KV head are counted token by token; a group of them, of one stream. */
struct row_group {
    const xq_store &store;
    const xq_attend_args &args;
    int nth_stream, head; /* KV head */
    int first, end;       /* rows */

    int n_rep() const { return args.n_head / store.n_head_kv; }
    int token(int row) const { return row / n_rep(); }
    int query_head(int row) const { return head * n_rep() + row % n_rep(); }
    float *state(int part, int row) const {
        return state_at(store, args, part, attend_row(args, nth_stream, token(row), query_head(row)));
    }
};

void attend_part(const kernel_set &set, const row_group &g, int part) {
    const xq_store &store = g.store;
    const xq_attend_args &args = g.args;
    const float *q[XQ_CPU_GROUP_ROWS];
    const uint16_t *mask[XQ_CPU_GROUP_ROWS];
    float slopes[XQ_CPU_GROUP_ROWS], *states[XQ_CPU_GROUP_ROWS];
    for (int row = g.first; row < g.end; ++row) {
        const int i = row - g.first, token = g.token(row), head = g.query_head(row);
        q[i] = query_at(args, g.nth_stream, token, head);
        mask[i] = mask_at(args, g.nth_stream, token);
        slopes[i] = slope_of(args.max_bias, head, args.n_head);
        states[i] = g.state(part, row);
    }
    const int stream = stream_of(args.first_stream, g.nth_stream);
    const page_range pages = pages_of_part(args, part);
    attention a = {};
    a.k = side_at(store.k, stream, g.head);
    a.v = side_at(store.v, stream, g.head);
    a.latent = store.latent;
    a.mapped = store.mapped != 0;
    if (a.mapped) {
        a.source = source_at(store, stream, g.head);
    }
    a.page_slot = table_of(store, args.table, stream);
    a.page_begin = pages.begin;
    a.page_end = pages.end;
    a.n_rows = g.end - g.first;
    a.q = q;
    a.mask = args.mask ? mask : nullptr;
    a.slope = args.max_bias > 0.0f ? slopes : nullptr;
    a.scale = args.scale;
    a.softcap = args.softcap;
    a.states = states;
    set.attend(a);
}

/* Merges the parts of one row: out [latent + e]. */
void finish_row(const kernel_set &set, const row_group &g, int row) {
    const int width = value_width(g.store), e = g.store.v.width, n = state_width(g.store) - 2;
    const int head = g.query_head(row);
    float *out = out_at(g.store, g.args, attend_row(g.args, g.nth_stream, g.token(row), head));
    const float sink = g.args.sinks ? g.args.sinks[head] : -INFINITY;
    float max = sink;
    for (int part = 0; part < g.args.n_parts; ++part) {
        max = std::max(max, g.state(part, row)[0]);
    }
    if (max == -INFINITY) {
        std::fill(out, out + width, 0.0f); // nothing is visible
        return;
    }
    float sum = std::exp(sink - max);
    float sums[3 * XQ_MAX_HEAD_DIM]; // sealed, open, source
    std::fill(sums, sums + n, 0.0f);
    for (int part = 0; part < g.args.n_parts; ++part) {
        const float *state = g.state(part, row);
        const float factor = std::exp(state[0] - max);
        if (factor == 0.0f) {
            continue;
        }
        sum += factor * state[1];
        for (int j = 0; j < n; ++j) {
            sums[j] += factor * state[2 + j];
        }
    }
    const float *open = sums + width, *source = open + width;
    std::copy(sums, sums + width, out);
    for (int k = 0; k < e && g.store.mapped; ++k) {
        const float *weight = map_of(g.store, g.head) + (int64_t)k * e;
        for (int j = 0; j < e; ++j) {
            out[j] += source[k] * weight[j];
        }
    }
    if (g.store.v.plan.rotate) {
        set.hadamard(out + g.store.latent, 1, e);
    }
    for (int j = 0; j < width; ++j) {
        out[j] = (out[j] + open[j]) / sum;
    }
}

/* Whether all other parts are done: what they wrote can be read then. */
bool is_last(const xq_attend_args &args, int64_t group) {
    if (args.n_parts == 1) {
        return true;
    }
    if (__atomic_add_fetch(&args.arrivals[group], 1, __ATOMIC_ACQ_REL) < (uint32_t)args.n_parts) {
        return false;
    }
    __atomic_store_n(&args.arrivals[group], 0, __ATOMIC_RELAXED);
    return true;
}

/* Merging a part takes as long as so many pages: what another thread wrote comes from its cache.  Measured on 8 and 16
 * threads (benchmarks/attention_op.py). */
constexpr double pages_to_merge = 0.6;
/* More of them for each thread gain nothing. */
constexpr int64_t most_parts_a_thread = 4;

} // namespace

int cpu_attend(const xq_store *store, const xq_attend_args *args, const xq_exec *exec) {
    if (!accepts_attend(store, args) || !accepts_exec("attend", exec) ||
        !in_range("attend on a CPU", {{"rotate", args->rotate, 0, 0}}) ||
        !accepts_table("attend", *store, args->table, args->first_stream, args->n_streams, args->n_kv_pages)) {
        return XQ_ERR_ARGUMENT;
    }
    const kernel_set *set = active_kernels();
    if (!set) {
        return XQ_ERR_KERNELS;
    }
    const int n_rows = args->n_tokens * (args->n_head / store->n_head_kv), n_heads = store->n_head_kv;
    const int64_t n_groups = (n_rows + XQ_CPU_GROUP_ROWS - 1) / XQ_CPU_GROUP_ROWS, n_parts = args->n_parts;
    each_task(*set, *exec, args->n_streams * n_groups * n_parts * n_heads, [&](int64_t task) {
        const int head = (int)(task % n_heads), part = (int)(task / n_heads % n_parts);
        const int64_t group = task / n_heads / n_parts; // over streams
        const int nth_stream = (int)(group / n_groups), first = (int)(group % n_groups) * XQ_CPU_GROUP_ROWS;
        const row_group g = {*store, *args, nth_stream, head, first, std::min(first + XQ_CPU_GROUP_ROWS, n_rows)};
        attend_part(*set, g, part);
        if (is_last(*args, group * n_heads + head)) {
            for (int row = g.first; row < g.end; ++row) {
                finish_row(*set, g, row);
            }
        }
    });
    return XQ_OK;
}

} // namespace xq

/* Threads take tasks in turn (each_task): the one with most of them is waited for, then for the merging. */
int32_t xq_cpu_parts(int64_t n_groups, int64_t n_pages, int32_t n_threads) {
    using namespace xq;
    const int64_t wanted = (most_parts_a_thread * n_threads + n_groups - 1) / n_groups;
    int64_t best = 1;
    double least = INFINITY;
    for (int64_t n_parts = 1; n_parts <= std::min(wanted, n_pages); ++n_parts) {
        const int64_t tasks = (n_groups * n_parts + n_threads - 1) / n_threads;
        const double pages = (double)(tasks * n_pages) / (double)n_parts + pages_to_merge * (double)n_parts;
        if (pages < least) {
            least = pages;
            best = n_parts;
        }
    }
    return (int32_t)best;
}
