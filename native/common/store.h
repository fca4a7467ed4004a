/* store.h: where a layer's pages and a verb's data lie: the only address arithmetic, for every backend.
 *
 *     codes or parameters of page p:  base + stream * s + head * h + page * p      (bytes; xq_side_store; from
 *                                     first_block on)
 *     F16 rows of the page in slot n: base + stream * s + head * h + n * XQ_PAGE * width      (elements)
 *       in the stage:             stage + head * h + (n - n_slots) * XQ_PAGE * width
 *     a page in byte slot n:          base + stream * s + head * h + slot * n      (bytes)
 *
 * Query rows of a KV head are counted token by token: row r is token r / n_rep and head r % n_rep of the n_rep heads
 * that share the KV head.  Nothing here looks at data, except first_stream and map_heads.  Free functions that each
 * file keeps to itself: the CPU's files are compiled for different instructions and must share none.
 */
#pragma once

#include "codec_format.h"

namespace xq {

/* ---- pages of a layer ---- */

/* One side (keys or values) of one KV head of one stream. */
struct side_view {
    xq_side plan; /* borrowed codes have its bits too */
    int32_t width;
    uint8_t *codes, *param;         /* of page 0; null where absent */
    int64_t codes_page, param_page; /* bytes from page to page */
    uint16_t *rows;                 /* F16 [slot][XQ_PAGE][width] */
    uint16_t *stage;                /* F16 [slot of the stage][XQ_PAGE][width]; null: there is none */
    int32_t first_staged;           /* slot that is the first of the stage */
    uint8_t *bytes;                 /* of byte slot 0; null where there are none */
    int64_t bytes_slot;             /* bytes from byte slot to byte slot */
};

XQ_BOTH const xq_side_store &side_of(const xq_store &store, bool is_k) {
    return is_k ? store.k : store.v;
}

/* Bytes first, the head's before the stream's: so a CUDA block keeps what all its threads share out of their registers.
 */
XQ_BOTH side_view side_at(const xq_side_store &side, int stream, int head) {
    return {side.plan,
            side.width,
            side.codes + (head * side.codes_head + stream * side.codes_stream),
            side.param + (head * side.param_head + stream * side.param_stream),
            side.codes_page,
            side.param_page,
            (uint16_t *)((char *)side.rows + (head * (2 * side.rows_head) + stream * (2 * side.rows_stream))),
            side.stage + head * side.stage_head,
            side.first_staged,
            side.bytes + (head * side.bytes_head + stream * side.bytes_stream),
            side.bytes_slot};
}
/* The values that the map of a KV head reads; they have no rows. */
XQ_BOTH side_view source_at(const xq_store &store, int stream, int head) {
    return side_at(store.source, stream, store.map_heads[head]);
}
/* Its map, [e of the source][e]. */
XQ_BOTH const float *map_of(const xq_store &store, int head) {
    return store.map + (int64_t)head * store.source.width * store.v.width;
}

XQ_BOTH uint8_t *page_codes(const side_view &side, int page) {
    return side.codes + page * side.codes_page;
}
XQ_BOTH uint8_t *page_param(const side_view &side, int page) {
    return side.param + page * side.param_page;
}
/* [XQ_PAGE][width] of an open page. */
XQ_BOTH uint16_t *slot_rows(const side_view &side, int slot) {
    return slot < side.first_staged ? side.rows + (int64_t)slot * XQ_PAGE * side.width
                                    : side.stage + (int64_t)(slot - side.first_staged) * XQ_PAGE * side.width;
}

/* ---- pages in bytes ----
 *
 * Where a page table says that a page lies: byte slot n is XQ_SLOT_BYTES - n, and the other way round. */

XQ_BOTH bool is_bytes(int slot) {
    return slot <= XQ_SLOT_BYTES;
}
XQ_BOTH int byte_slot(int slot) {
    return XQ_SLOT_BYTES - slot;
}
XQ_BOTH int slot_of_bytes(int byte_slot) {
    return XQ_SLOT_BYTES - byte_slot;
}

/* Whether it is read as it came: rows or bytes, not rotated. */
XQ_BOTH bool is_open(int slot) {
    return slot >= 0 || is_bytes(slot);
}

/* One side of a page in bytes. */
struct byte_page {
    int8_t *codes;   /* [XQ_PAGE][width] */
    uint16_t *scale; /* F16 [n], and the centres behind them; n: */
    int width, n;
    bool by_channel; /* keys: n = width parameters; else one of each token: n = XQ_PAGE */
};
XQ_BOTH byte_page bytes_at(const side_view &side, bool is_k, int slot) {
    uint8_t *at = side.bytes + byte_slot(slot) * side.bytes_slot;
    return {(int8_t *)at, (uint16_t *)(at + XQ_PAGE * side.width), side.width, is_k ? side.width : XQ_PAGE, is_k};
}

/* Whether its codes are its own, not another layer's. */
XQ_BOTH bool own_codes(const side_view &side) {
    return side.plan.owner < 0;
}

/* Sides that a layer stores: all values may be channels of keys. */
XQ_BOTH int n_sides(const xq_store &store) {
    return store.v.width > 0 ? 2 : 1;
}
/* Channels of the values that are read. */
XQ_BOTH int value_width(const xq_store &store) {
    return store.latent + store.v.width;
}

/* ---- update ---- */

/* A move, as the lists of xq_update_args and xq_keys_args hold it. */
struct page_move {
    int32_t stream, page, slot, refill;
    uint32_t valid[4];
    int32_t small = XQ_SLOT_SEALED; /* where it lies when it is smaller */
};
static_assert(sizeof(page_move) == XQ_MOVE_WORDS * sizeof(int32_t), "a move has XQ_MOVE_WORDS words");

XQ_BOTH const page_move &move_at(const int32_t *moves, int nth) {
    return *(const page_move *)(moves + (int64_t)nth * XQ_MOVE_WORDS);
}

/* ---- indices in tensors ----
 *
 * The CPU looks at all of them before a verb begins.  Of a GPU's only the kernels see any: what there is not stands for
 * something that is there, so that nothing out of bounds is touched, whoever made the graph. */

XQ_BOTH int safe_stream(const xq_store &store, int stream) {
    return (uint32_t)stream < (uint32_t)store.n_streams ? stream : 0;
}
/* A slot of F16 rows, of the stage as well. */
XQ_BOTH bool is_slot(const xq_store &store, int slot) {
    return (uint32_t)slot < (uint32_t)(store.n_slots + store.n_staged);
}
XQ_BOTH bool has_bytes(const xq_store &store, int slot) {
    return is_bytes(slot) && byte_slot(slot) < store.n_bytes;
}
XQ_BOTH bool has_codes(const xq_store &store, int page, int slot) {
    return slot == XQ_SLOT_SEALED && store.k.param && page >= store.first_block;
}
/* Whether a page may lie there. */
XQ_BOTH bool has_page(const xq_store &store, int page, int slot) {
    return is_slot(store, slot) || has_bytes(store, slot) || has_codes(store, page, slot);
}
XQ_BOTH int safe_slot(const xq_store &store, int page, int slot) {
    return has_page(store, page, slot) ? slot : (int)XQ_SLOT_NONE;
}
XQ_BOTH bool names_page(const xq_store &store, const page_move &move) {
    return (uint32_t)move.stream < (uint32_t)store.n_streams && (uint32_t)move.page < (uint32_t)store.n_pages;
}
/* Whether a move of the list of seals, of unseals, of the pages whose keys are wanted, is one. */
XQ_BOTH bool can_seal(const xq_store &store, const page_move &move) {
    return names_page(store, move) &&
           (is_slot(store, move.slot) ? has_bytes(store, move.small) || has_codes(store, move.page, move.small)
                                      : has_bytes(store, move.slot) && has_codes(store, move.page, move.small));
}
XQ_BOTH bool can_unseal(const xq_store &store, const page_move &move) {
    return names_page(store, move) && is_slot(store, move.slot) &&
           (has_bytes(store, move.small) || has_codes(store, move.page, move.small));
}
XQ_BOTH bool has_keys(const xq_store &store, const page_move &move) {
    return names_page(store, move) && has_page(store, move.page, move.slot);
}
/* Whether a slot of a stream is refilled after its page was sealed. */
XQ_BOTH bool is_refilled(const xq_store &store, const page_move &move) {
    return (uint32_t)move.slot < (uint32_t)store.n_slots && move.refill >= store.n_slots && is_slot(store, move.refill);
}
/* Rows that xq_update_args may name. */
XQ_BOTH int64_t count_rows(const xq_store &store) {
    return ((int64_t)store.n_streams * store.n_slots + store.n_staged) * XQ_PAGE;
}
XQ_BOTH bool is_row(const xq_store &store, int32_t row) {
    return (uint32_t)row < (uint32_t)count_rows(store);
}

/* [width] of a row of xq_update_args. */
XQ_BOTH uint16_t *row_at(const xq_store &store, bool is_k, int head, int32_t row) {
    const xq_side_store &side = side_of(store, is_k);
    const int of_a_stream = store.n_slots * XQ_PAGE, staged = row - store.n_streams * of_a_stream;
    const int stream = staged < 0 ? row / of_a_stream : 0;
    const side_view at = side_at(side, stream, head);
    return staged < 0 ? at.rows + (int64_t)(row - stream * of_a_stream) * at.width
                      : at.stage + (int64_t)staged * at.width;
}
/* [width] of a new key or value. */
XQ_BOTH const float *new_row(const xq_update_args &args, bool is_k, int token, int head) {
    return is_k ? (const float *)((const char *)args.k_cur + token * args.k_token_stride + head * args.k_head_stride)
                : (const float *)((const char *)args.v_cur + token * args.v_token_stride + head * args.v_head_stride);
}

/* ---- attend ---- */

/* Stream of the cache that the nth of a verb's streams is; first_stream may be null. */
XQ_BOTH int stream_of(const int32_t *first_stream, int nth_stream) {
    return (first_stream ? *first_stream : 0) + nth_stream;
}
/* [n_pages]: slots of a stream's pages. */
XQ_BOTH const int32_t *table_of(const xq_store &store, const int32_t *table, int stream) {
    return table + (int64_t)stream * store.n_pages;
}

/* [d] of a query. */
XQ_BOTH const float *query_at(const xq_attend_args &args, int nth_stream, int token, int head) {
    return (const float *)((const char *)args.q + head * args.q_head_stride +
                           (nth_stream * args.n_tokens + token) * args.q_token_stride);
}
/* F16 [n_kv_pages * XQ_PAGE]: what is added to a token's scores; null: nothing is. */
XQ_BOTH const uint16_t *mask_at(const xq_attend_args &args, int nth_stream, int token) {
    return args.mask ? (const uint16_t *)((const char *)args.mask + nth_stream * args.mask_stream_stride +
                                          token * args.mask_token_stride)
                     : (const uint16_t *)0;
}

/* Pages of a part that takes pages which follow each other. */
struct page_range {
    int begin, end;
};
XQ_BOTH page_range pages_of_part(const xq_attend_args &args, int part) {
    const int length = (args.n_kv_pages + args.n_parts - 1) / args.n_parts, n = args.n_kv_pages;
    const int begin = part * length < n ? part * length : n;
    return {begin, begin + length < n ? begin + length : n};
}

/* Row of [stream][token][head], as q, states and out are ordered. */
XQ_BOTH int64_t attend_row(const xq_attend_args &args, int nth_stream, int token, int head) {
    return ((int64_t)nth_stream * args.n_tokens + token) * args.n_head + head;
}
/* Numbers of a state: maximum, sum of p, then sums over values: sealed, open and, mapped, those of the source. */
XQ_BOTH int state_width(const xq_store &store) {
    return (store.mapped ? 3 : 2) * value_width(store) + 2;
}
XQ_BOTH float *state_at(const xq_store &store, const xq_attend_args &args, int part, int64_t row) {
    const int64_t n_rows = (int64_t)args.n_streams * args.n_tokens * args.n_head;
    return args.partial + (part * n_rows + row) * state_width(store);
}
/* [latent + e] of an output. */
XQ_BOTH float *out_at(const xq_store &store, const xq_attend_args &args, int64_t row) {
    return args.out + row * value_width(store);
}

/* ---- unpack, read_keys, write_keys ---- */

/* [width] of a cell of unpack's output; elements from one cell to the next: n_heads * width. */
XQ_BOTH uint16_t *unpacked_row(const xq_store &store, const xq_unpack_args &args, int nth_stream, int page, int token,
                               int nth_head) {
    const int64_t cell = ((int64_t)nth_stream * args.n_kv_pages + page) * XQ_PAGE + token;
    return args.rows + (cell * args.n_heads + nth_head) * side_of(store, args.is_k != 0).width;
}
/* [d] of a key. */
XQ_BOTH float *key_at(const xq_keys_args &args, int nth_page, int token, int head) {
    return (float *)((char *)args.keys + ((int64_t)nth_page * XQ_PAGE + token) * args.token_stride +
                     head * args.head_stride);
}

} // namespace xq
