/* xquant-offsets.h: where pages of a layer lie in its tensors, in bytes: what is read and written from the host. */
#pragma once

#include "xquant-kv-cache.h"

#include "store.h"

namespace xquant {

inline xq_store store_of(const layer &l) {
    const ggml_tensor *blocks = l.nodes.blocks, *rows = l.nodes.rows;
    xq_store store = {};
    xq_store_init(&store, &l.plan, &l.shape, blocks->ne[0] > 1 ? (uint8_t *)blocks->data : nullptr,
                  (int64_t)blocks->nb[1], (uint16_t *)rows->data, (int64_t)rows->nb[1]);
    return store;
}

/* Rows of one side of an open page, in the layer's rows: F16 [XQ_PAGE][d or e]. */
inline size_t row_offset(const layer &l, bool is_k, int32_t stream, int32_t head, int32_t slot) {
    const xq_store store = store_of(l);
    const uint16_t *at = xq::slot_rows(xq::side_at(xq::side_of(store, is_k), stream, head), slot);
    return (size_t)((const char *)at - (const char *)l.nodes.rows->data);
}

/* Block of a KV head of a page in bytes, in the layer's rows: xq_byte_block_bytes. */
inline size_t byte_offset(const layer &l, int32_t stream, int32_t head, int32_t state) {
    const xq_store store = store_of(l);
    const int8_t *at = xq::bytes_at(xq::side_at(store.k, stream, head), true, state).codes;
    return (size_t)((const char *)at - (const char *)l.nodes.rows->data);
}

/* Bytes of a page of all KV heads: as rows, and as bytes. */
inline int64_t page_rows(const layer &l) {
    xq_shape one = l.shape;
    one.n_slots = 1, one.n_bytes = 0;
    return xq_store_row_bytes(&one);
}
inline int64_t page_bytes(const layer &l) {
    return l.shape.n_head_kv * xq_byte_block_bytes(l.shape.d, l.shape.e);
}

/* Block of a sealed page, in the layer's blocks: block_bytes. */
inline size_t block_offset(const layer &l, int32_t stream, int32_t head, int32_t page) {
    xq_block_layout layout;
    xq_block_layout_of(&l.plan, l.shape.d, l.shape.e, &layout);
    const uint8_t *at = xq::page_param(xq::side_at(store_of(l).k, stream, head), page) - layout.k_param;
    return (size_t)(at - (const uint8_t *)l.nodes.blocks->data);
}

} // namespace xquant
