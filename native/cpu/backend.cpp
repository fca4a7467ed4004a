/* backend.cpp: the CPU backend: its table of verbs, and the checks that they share. */
#include "verbs.h"

namespace xq {

bool accepts_exec(const char *verb, const xq_exec *exec) {
    return none_null(verb, {{"exec", exec}}) &&
           in_range(verb, {{"exec.nth", exec->nth, 1, INT32_MAX}, {"exec.ith", exec->ith, 0, exec->nth - 1}});
}

bool accepts_moves(const char *verb, const xq_store &store, const char *name, const int32_t *moves, int32_t n,
                   moves_kind kind) {
    const auto can = kind == moves_seal ? can_seal : kind == moves_unseal ? can_unseal : has_keys;
    for (int32_t i = 0; i < n; ++i) {
        const page_move &move = move_at(moves, i);
        if (kind == moves_seal && move.slot == XQ_SLOT_NONE) {
            continue;
        }
        if (!can(store, move)) {
            return !fail(
                XQ_ERR_ARGUMENT,
                "%s: %s[%d] is page %d of stream %d and slot %d, smaller %d; there are %d pages, %d streams, %d "
                "slots and, from %d down, %d byte slots; %d is %s, of pages from %d on",
                verb, name, i, move.page, move.stream, move.slot, move.small, store.n_pages, store.n_streams,
                store.n_slots + store.n_staged, XQ_SLOT_BYTES, store.n_bytes, XQ_SLOT_SEALED,
                store.k.param ? "sealed" : "not allowed: the layer never seals", store.first_block);
        }
        if (kind == moves_seal && move.refill != XQ_SLOT_NONE && !is_refilled(store, move)) {
            return !fail(XQ_ERR_ARGUMENT,
                         "%s: %s[%d] refills slot %d from slot %d; it must be a slot of a stream, 0 to %d, and one of "
                         "the stage, which has %d from %d on",
                         verb, name, i, move.slot, move.refill, store.n_slots - 1, store.n_staged, store.n_slots);
        }
    }
    return true;
}

bool accepts_table(const char *verb, const xq_store &store, const int32_t *table, const int32_t *first_stream,
                   int32_t n_streams, int32_t n_kv_pages) {
    if (first_stream && !in_range(verb, {{"first_stream", *first_stream, 0, store.n_streams - n_streams}})) {
        return false;
    }
    for (int32_t s = 0; s < n_streams; ++s) {
        const int32_t *slots = table_of(store, table, stream_of(first_stream, s));
        for (int32_t p = 0; p < n_kv_pages; ++p) {
            if (!has_page(store, p, slots[p]) && slots[p] != XQ_SLOT_NONE) {
                return !fail(XQ_ERR_ARGUMENT,
                             "%s: table says %d of page %d of stream %d; there are %d slots, %d is %s, of pages from "
                             "%d on, %d nowhere, and from %d down there are %d byte slots",
                             verb, slots[p], p, stream_of(first_stream, s), store.n_slots + store.n_staged,
                             XQ_SLOT_SEALED, store.k.param ? "sealed" : "not allowed: the layer never seals",
                             store.first_block, XQ_SLOT_NONE, XQ_SLOT_BYTES, store.n_bytes);
            }
        }
    }
    return true;
}

static const char *attend_kernel(const xq_store *store) {
    return accepts_store(store) ? xq_kernels() : nullptr;
}

} // namespace xq

const xq_backend *xq_cpu(void) {
    static const xq_backend backend = {
        "cpu",          xq_error,          xq::cpu_update,     xq::cpu_attend,
        xq::cpu_unpack, xq::cpu_read_keys, xq::cpu_write_keys, xq::attend_kernel,
        nullptr,        nullptr,
    };
    return &backend;
}
