/* check.h: what the verbs of every backend refuse, in the same words.
 *
 * Each function returns false after a call of `fail`, which a backend defines: it keeps the message for error() on this
 * thread.  What lies behind pointers is not looked at: on a GPU it cannot be.
 */
#pragma once

#include "store.h"

#include <initializer_list>

namespace xq {

int fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));

struct named_pointer {
    const char *name;
    const void *value;
};
inline bool none_null(const char *verb, std::initializer_list<named_pointer> pointers) {
    for (const named_pointer &p : pointers) {
        if (!p.value) {
            return !fail(XQ_ERR_ARGUMENT, "%s: %s must not be null", verb, p.name);
        }
    }
    return true;
}

struct named_count {
    const char *name;
    int64_t value, least, most;
};
inline bool in_range(const char *verb, std::initializer_list<named_count> counts) {
    for (const named_count &c : counts) {
        if (c.value < c.least || c.value > c.most) {
            return !fail(XQ_ERR_ARGUMENT, "%s: %s is %lld, must be %lld to %lld", verb, c.name, (long long)c.value,
                         (long long)c.least, (long long)c.most);
        }
    }
    return true;
}

struct named_stride {
    const char *name;
    int64_t value;
    int bytes; /* that it must be a multiple of: a power of two */
};
inline bool multiples(const char *verb, std::initializer_list<named_stride> strides) {
    for (const named_stride &s : strides) {
        if (s.value < 0 || (s.value & (s.bytes - 1)) != 0) {
            return !fail(XQ_ERR_ARGUMENT, "%s: %s is %lld, must be a multiple of %d", verb, s.name, (long long)s.value,
                         s.bytes);
        }
    }
    return true;
}

/* One side of a store.  seals: whether the layer ever seals. */
inline bool accepts_side(const char *name, const xq_side_store &side, bool is_k, bool seals) {
    if (!is_width(side.width)) {
        return !fail(XQ_ERR_ARGUMENT, "store: %s.width is %d, must be a multiple of 16 from 16 to %d", name, side.width,
                     XQ_MAX_HEAD_DIM);
    }
    if (xq_check_side(&side.plan, is_k, side.width) != XQ_OK) {
        return !fail(XQ_ERR_ARGUMENT, "store: %s: %s", name, xq_error());
    }
    if (seals != (side.param != nullptr)) {
        return !fail(XQ_ERR_ARGUMENT, "store: k.param and v.param must both be there, or, if the layer never seals, "
                                      "neither");
    }
    return !seals || side.plan.bits == 0 || side.codes ||
           !fail(XQ_ERR_ARGUMENT, "store: %s.codes must not be null for %d bits", name, side.plan.bits);
}

/* Where pages in bytes lie: parameters are F16. */
inline bool accepts_bytes(const char *name, const xq_side_store &side) {
    return (side.bytes || !fail(XQ_ERR_ARGUMENT, "store: %s.bytes must not be null", name)) &&
           multiples(name, {{"address of bytes", (int64_t)(uintptr_t)side.bytes, 2},
                            {"bytes_slot", side.bytes_slot, 2},
                            {"bytes_head", side.bytes_head, 2},
                            {"bytes_stream", side.bytes_stream, 2}});
}

/* How many of the values' channels are the keys'. */
inline bool accepts_latent(const xq_store &store) {
    return in_range("store", {{"latent", store.latent, 0, store.k.width}}) &&
           multiples("store", {{"latent", store.latent, 16}}) &&
           in_range("store", {{"latent + v.width", value_width(store), 16, XQ_MAX_HEAD_DIM}}) &&
           (!store.latent || !store.mapped ||
            !fail(XQ_ERR_ARGUMENT, "store: latent is %d and mapped 1; one of them must be 0", store.latent));
}

/* The values that a map of the store reads; seals: whether the layer ever seals, and its source with it. */
inline bool accepts_source(const xq_store &store, bool seals) {
    const xq_side_store &source = store.source;
    return none_null("store", {{"map_heads", store.map_heads}, {"map", store.map}}) &&
           (!seals || none_null("store", {{"source.param", source.param}})) &&
           accepts_side("source", source, false, source.param != nullptr) &&
           (source.width == store.v.width ||
            !fail(XQ_ERR_ARGUMENT, "store: source.width is %d, must be v.width, %d", source.width, store.v.width)) &&
           (source.plan.owner < 0 ||
            !fail(XQ_ERR_ARGUMENT, "store: source.plan.owner is %d: it must have codes of its own", source.plan.owner));
}

/* One side's stage, if there is one. */
inline bool accepts_stage(const char *name, const xq_store &store, const xq_side_store &side) {
    return (side.first_staged == store.n_slots ||
            !fail(XQ_ERR_ARGUMENT, "store: %s.first_staged is %d, must be n_slots, %d", name, side.first_staged,
                  store.n_slots)) &&
           (store.n_staged == 0 || side.stage ||
            !fail(XQ_ERR_ARGUMENT, "store: %s.stage must not be null for n_staged %d", name, store.n_staged));
}

inline bool accepts_store(const xq_store *store) {
    constexpr int most = 1 << 22; // a page's number times its bytes of a mask fits an int
    if (!none_null("store", {{"store", store}}) || !in_range("store", {{"n_head_kv", store->n_head_kv, 1, INT16_MAX},
                                                                       {"n_pages", store->n_pages, 1, most},
                                                                       {"n_slots", store->n_slots, 1, most},
                                                                       {"n_streams", store->n_streams, 1, most},
                                                                       {"n_bytes", store->n_bytes, 0, most}})) {
        return false;
    }
    const bool seals = store->k.param != nullptr;
    return in_range("store", {{"n_staged", store->n_staged, 0, most},
                              {"first_block", store->first_block, 0, store->n_pages - 1}}) &&
           in_range("store", {{"(n_streams * n_slots + n_staged) * 128", count_rows(*store), 1, INT32_MAX}}) &&
           accepts_stage("k", *store, store->k) && (store->v.width == 0 || accepts_stage("v", *store, store->v)) &&
           none_null("store", {{"k.rows", store->k.rows}}) && accepts_side("k", store->k, true, seals) &&
           ((store->latent > 0 && store->v.width == 0) ||
            (none_null("store", {{"v.rows", store->v.rows}}) && accepts_side("v", store->v, false, seals))) &&
           accepts_latent(*store) &&
           (store->n_bytes == 0 ||
            (accepts_bytes("k", store->k) && (store->v.width == 0 || accepts_bytes("v", store->v)))) &&
           (!seals || store->v.width == 0 ||
            (store->v.plan.source >= 0) == (store->mapped != 0) || // who never seals needs no map
            !fail(XQ_ERR_ARGUMENT, "store: mapped is %d, but v.plan.source is %d", store->mapped,
                  store->v.plan.source)) &&
           (!store->mapped || accepts_source(*store, seals));
}

/* A call moves pages or writes rows, never both: attention that overtakes the writing of rows counts on that. */
inline bool accepts_update(const xq_store *store, const xq_update_args *args) {
    if (!accepts_store(store) || !none_null("update", {{"args", args}}) ||
        !in_range("update", {{"n_seals", args->n_seals, 0, INT32_MAX},
                             {"n_unseals", args->n_unseals, 0, INT32_MAX},
                             {"n_tokens", args->n_tokens, 0, INT32_MAX},
                             {"rotate", args->rotate, 0, 1}})) {
        return false;
    }
    const bool seals = args->n_seals > 0, unseals = args->n_unseals > 0, writes = args->n_tokens > 0;
    if ((seals || unseals) && writes) {
        return !fail(XQ_ERR_ARGUMENT,
                     "update: n_seals is %d, n_unseals %d and n_tokens %d; a call moves pages or "
                     "writes rows, never both",
                     args->n_seals, args->n_unseals, args->n_tokens);
    }
    if ((seals || unseals) && !store->k.param && store->n_bytes == 0) {
        return !fail(XQ_ERR_ARGUMENT, "update: n_seals is %d and n_unseals %d, but the layer never seals",
                     args->n_seals, args->n_unseals);
    }
    return (!seals || none_null("update", {{"seals", args->seals}})) &&
           (!args->serial || none_null("update", {{"done", args->done}})) &&
           (!unseals || none_null("update", {{"unseals", args->unseals}})) &&
           (!(seals || writes) || none_null("update", {{"n_nonfinite", args->n_nonfinite}})) &&
           (!writes || (none_null("update", {{"rows", args->rows}, {"k_cur", args->k_cur}}) &&
                        (n_sides(*store) == 1 || none_null("update", {{"v_cur", args->v_cur}})) &&
                        multiples("update", {{"k_head_stride", args->k_head_stride, 4},
                                             {"k_token_stride", args->k_token_stride, 4},
                                             {"v_head_stride", args->v_head_stride, 4},
                                             {"v_token_stride", args->v_token_stride, 4}})));
}

inline bool accepts_attend(const xq_store *store, const xq_attend_args *args) {
    if (!accepts_store(store) || !none_null("attend", {{"args", args}}) ||
        !none_null("attend",
                   {{"q", args->q}, {"table", args->table}, {"partial", args->partial}, {"out", args->out}}) ||
        !in_range("attend", {{"n_head", args->n_head, store->n_head_kv, INT32_MAX},
                             {"n_tokens", args->n_tokens, 1, INT32_MAX},
                             {"n_streams", args->n_streams, 1, store->n_streams},
                             {"n_kv_pages", args->n_kv_pages, 0, store->n_pages},
                             {"n_parts", args->n_parts, 1, INT16_MAX},
                             {"rotate", args->rotate, 0, 1}})) {
        return false;
    }
    const int64_t n_tokens = (int64_t)args->n_streams * args->n_tokens;
    return in_range("attend", {{"n_streams * n_tokens", n_tokens, 1, INT32_MAX},
                               {"n_streams * n_tokens * n_head", n_tokens * args->n_head, 1, INT32_MAX}}) &&
           multiples("attend",
                     {{"q_head_stride", args->q_head_stride, 4}, {"q_token_stride", args->q_token_stride, 4}}) &&
           (!args->mask || multiples("attend", {{"mask_token_stride", args->mask_token_stride, 2},
                                                {"mask_stream_stride", args->mask_stream_stride, 2}})) &&
           (args->n_parts == 1 || none_null("attend", {{"arrivals", args->arrivals}})) &&
           (args->n_head % store->n_head_kv == 0 ||
            !fail(XQ_ERR_ARGUMENT, "attend: n_head is %d, must be a multiple of n_head_kv, %d", args->n_head,
                  store->n_head_kv)) &&
           (args->scale > 0.0f || !fail(XQ_ERR_ARGUMENT, "attend: scale is %g, must be above 0", (double)args->scale));
}

inline bool accepts_unpack(const xq_store *store, const xq_unpack_args *args) {
    return accepts_store(store) && none_null("unpack", {{"args", args}}) &&
           none_null("unpack", {{"table", args->table}, {"rows", args->rows}}) &&
           in_range("unpack", {{"n_streams", args->n_streams, 1, store->n_streams},
                               {"n_kv_pages", args->n_kv_pages, 1, store->n_pages},
                               {"is_k", args->is_k, n_sides(*store) == 1 ? 1 : 0, 1},
                               {"first_head", args->first_head, 0, store->n_head_kv - 1},
                               {"n_heads", args->n_heads, 1, store->n_head_kv - (int64_t)args->first_head}});
}

/* verb: read_keys or write_keys. */
inline bool accepts_keys(const char *verb, const xq_store *store, const xq_keys_args *args) {
    return accepts_store(store) && none_null(verb, {{"args", args}}) &&
           none_null(verb, {{"pages", args->pages}, {"keys", args->keys}}) &&
           in_range(verb, {{"n_pages", args->n_pages, 1, INT32_MAX}}) &&
           multiples(verb, {{"head_stride", args->head_stride, 4}, {"token_stride", args->token_stride, 4}});
}

} // namespace xq
