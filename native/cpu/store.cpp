/* store.cpp: where a layer's storage lies: two areas of memory, whose addresses alone are looked at.
 *
 *     blocks  [stream][KV head][page][block], pages from first_block on;
 *                                              block: K codes | K parameters | V codes | V parameters
 *     rows    F16 [stream], of each: K [KV head][slot][XQ_PAGE][d], then V [KV head][slot][XQ_PAGE][e],
 *             then [KV head][byte slot][block];
 *                                              block: K bytes | K parameters | V bytes | V parameters
 */
#include "check.h"
#include "kernels.h"

using namespace xq;

namespace {

bool accepts_shape(const xq_shape *shape) {
    constexpr int most = 1 << 22;
    return none_null("shape", {{"shape", shape}}) &&
           in_range("shape", {{"n_head_kv", shape->n_head_kv, 1, INT16_MAX},
                              {"n_pages", shape->n_pages, 1, most},
                              {"n_slots", shape->n_slots, 1, most},
                              {"n_streams", shape->n_streams, 1, most},
                              {"n_bytes", shape->n_bytes, 0, most}}) &&
           in_range("shape", {{"first_block", shape->first_block, 0, shape->n_pages - 1}});
}

/* One side over both areas.  codes_at, param_at: in a block, -1 where absent; rows: of the side's first KV head. */
xq_side_store side_store(const xq_side &plan, int32_t width, const xq_shape &shape, uint8_t *blocks,
                         int64_t blocks_stream, const xq_block_layout &layout, int32_t codes_at, int32_t param_at,
                         uint16_t *rows, int64_t rows_stream) {
    xq_side_store side = {};
    side.plan = plan;
    side.width = width;
    const int64_t head = (int64_t)(shape.n_pages - shape.first_block) * layout.bytes;
    const int64_t before = (int64_t)shape.first_block * layout.bytes; // where page 0 would be
    if (blocks && codes_at >= 0) {
        side.codes = blocks + codes_at - before;
        side.codes_page = layout.bytes;
        side.codes_head = head;
        side.codes_stream = blocks_stream;
    }
    if (blocks && param_at >= 0) {
        side.param = blocks + param_at - before;
        side.param_page = layout.bytes;
        side.param_head = head;
        side.param_stream = blocks_stream;
    }
    side.rows = rows;
    side.rows_head = (int64_t)shape.n_slots * XQ_PAGE * width;
    side.rows_stream = rows_stream / (int64_t)sizeof(uint16_t);
    side.first_staged = shape.n_slots;
    return side;
}

/* Bytes of a stream's F16 rows, and of a page in bytes of one KV head. */
int64_t half_bytes(const xq_shape &shape, int32_t width) {
    return (int64_t)shape.n_head_kv * shape.n_slots * XQ_PAGE * width * (int64_t)sizeof(uint16_t);
}
int64_t byte_block(const xq_shape &shape) {
    return page_in_bytes(true, shape.d) + page_in_bytes(false, shape.e);
}

/* Adds where a side's pages in bytes lie.  at: in a block. */
void put_bytes(xq_side_store &side, const xq_shape &shape, uint16_t *rows, int64_t rows_stream, int64_t at) {
    if (shape.n_bytes > 0 && side.width > 0) {
        side.bytes = (uint8_t *)rows + half_bytes(shape, shape.d + shape.e) + at;
        side.bytes_slot = byte_block(shape);
        side.bytes_head = shape.n_bytes * side.bytes_slot;
        side.bytes_stream = rows_stream;
    }
}

/* Whether two layers have as many heads, pages and streams: what one stores of a page, the other can read. */
bool is_as_large(const char *what, const xq_store &store, const xq_store &other, bool heads) {
    return (store.n_pages == other.n_pages && store.n_streams == other.n_streams &&
            store.first_block == other.first_block && (!heads || store.n_head_kv == other.n_head_kv)) ||
           !fail(XQ_ERR_ARGUMENT,
                 "%s has %d KV heads, %d pages and %d streams, blocks from page %d on, the layer that reads it %d, %d, "
                 "%d and %d",
                 what, other.n_head_kv, other.n_pages, other.n_streams, other.first_block, store.n_head_kv,
                 store.n_pages, store.n_streams, store.first_block);
}

} // namespace

int64_t xq_store_block_bytes(const xq_layer *layer, const xq_shape *shape) {
    xq_block_layout layout;
    if (!accepts_shape(shape)) {
        return XQ_ERR_ARGUMENT;
    }
    const int status = xq_block_layout_of(layer, shape->d, shape->e, &layout);
    const int64_t n_blocks = (int64_t)shape->n_head_kv * (shape->n_pages - shape->first_block);
    return status == XQ_OK ? n_blocks * layout.bytes : status;
}

int64_t xq_store_row_bytes(const xq_shape *shape) {
    if (!accepts_shape(shape)) {
        return XQ_ERR_ARGUMENT;
    }
    if (shape->d < 16 || shape->d > XQ_MAX_HEAD_DIM || shape->e < 0 || shape->e > XQ_MAX_HEAD_DIM) {
        return fail(XQ_ERR_ARGUMENT, "shape: d is %d and e %d, must be 16 to %d; e is 0 where values are the keys'",
                    shape->d, shape->e, XQ_MAX_HEAD_DIM);
    }
    return half_bytes(*shape, shape->d + shape->e) + shape->n_head_kv * shape->n_bytes * byte_block(*shape);
}

int xq_store_init(xq_store *store, const xq_layer *layer, const xq_shape *shape, uint8_t *blocks, int64_t blocks_stream,
                  uint16_t *rows, int64_t rows_stream) {
    if (!none_null("xq_store_init", {{"store", store}, {"layer", layer}, {"rows", rows}}) || !accepts_shape(shape)) {
        return XQ_ERR_ARGUMENT;
    }
    xq_block_layout layout;
    if (const int status = xq_block_layout_of(layer, shape->d, shape->e, &layout); status != XQ_OK) {
        return status;
    }
    const int64_t block_bytes = xq_store_block_bytes(layer, shape), row_bytes = xq_store_row_bytes(shape);
    if (shape->n_streams > 1 &&
        ((blocks && blocks_stream < block_bytes) || rows_stream < row_bytes || rows_stream % 2)) {
        return fail(XQ_ERR_ARGUMENT,
                    "xq_store_init: streams are %lld bytes of blocks and %lld bytes of rows apart, each has %lld and "
                    "%lld; rows are 2 bytes",
                    (long long)blocks_stream, (long long)rows_stream, (long long)block_bytes, (long long)row_bytes);
    }
    *store = {};
    store->n_head_kv = shape->n_head_kv;
    store->n_pages = shape->n_pages;
    store->n_slots = shape->n_slots;
    store->n_streams = shape->n_streams;
    store->n_bytes = shape->n_bytes;
    store->first_block = shape->first_block;
    uint16_t *v_rows = rows + half_bytes(*shape, shape->d) / (int64_t)sizeof(uint16_t);
    store->k = side_store(layer->k, shape->d, *shape, blocks, blocks_stream, layout, layout.k_codes, layout.k_param,
                          rows, rows_stream);
    store->k.plan.rotate = 0; // the caller has done it
    store->v = side_store(layer->v, shape->e, *shape, blocks, blocks_stream, layout, layout.v_codes, layout.v_param,
                          v_rows, rows_stream);
    put_bytes(store->k, *shape, rows, rows_stream, 0);
    put_bytes(store->v, *shape, rows, rows_stream, page_in_bytes(true, shape->d));
    return XQ_OK;
}

int xq_store_stage(xq_store *store, uint16_t *stage, int32_t n) {
    if (!none_null("xq_store_stage", {{"store", store}, {"stage", stage}}) ||
        !in_range("xq_store_stage", {{"n", n, 1, 1 << 22}})) {
        return XQ_ERR_ARGUMENT;
    }
    store->n_staged = n;
    for (xq_side_store *side : {&store->k, &store->v}) {
        side->stage = stage;
        side->stage_head = (int64_t)n * XQ_PAGE * side->width;
        stage += store->n_head_kv * side->stage_head;
    }
    return XQ_OK;
}

int xq_store_latent(xq_store *store, int32_t n) {
    if (!none_null("xq_store_latent", {{"store", store}})) {
        return XQ_ERR_ARGUMENT;
    }
    const int32_t most =
        store->k.width < XQ_MAX_HEAD_DIM - store->v.width ? store->k.width : XQ_MAX_HEAD_DIM - store->v.width;
    if (store->mapped || n < 16 || n > most || n % 16) {
        return fail(XQ_ERR_ARGUMENT,
                    "xq_store_latent: n is %d, must be a multiple of 16 from 16 to %d, and mapped %d, 0", n, most,
                    store->mapped);
    }
    store->latent = n;
    return XQ_OK;
}

int xq_store_borrow(xq_store *store, int32_t is_k, const xq_store *owner) {
    if (!none_null("xq_store_borrow", {{"store", store}, {"owner", owner}}) ||
        !is_as_large("the owner", *store, *owner, true)) {
        return XQ_ERR_ARGUMENT;
    }
    xq_side_store &side = is_k ? store->k : store->v;
    const xq_side_store &from = is_k ? owner->k : owner->v;
    if (side.plan.owner < 0 || from.plan.owner >= 0 || side.plan.bits != from.plan.bits || side.width != from.width ||
        side.plan.rotate != from.plan.rotate || (side.param && !from.codes && side.plan.bits > 0)) {
        return fail(XQ_ERR_ARGUMENT,
                    "xq_store_borrow: codes of %d bits, width %d, rotated %d; the layer's plan says owner %d, %d bits, "
                    "width %d, rotated %d; the owner's codes must be its own",
                    from.plan.bits, from.width, from.plan.rotate, side.plan.owner, side.plan.bits, side.width,
                    side.plan.rotate);
    }
    if (side.param) {
        side.codes = from.codes;
        side.codes_page = from.codes_page;
        side.codes_head = from.codes_head;
        side.codes_stream = from.codes_stream;
    }
    return XQ_OK;
}

int xq_store_map(xq_store *store, const xq_store *source, const int32_t *heads, const float *map) {
    if (!none_null("xq_store_map", {{"store", store}, {"source", source}, {"heads", heads}, {"map", map}}) ||
        !is_as_large("the source", *store, *source, false)) {
        return XQ_ERR_ARGUMENT;
    }
    const xq_side &plan = source->v.plan;
    if (store->v.plan.source < 0 || plan.owner >= 0 || plan.source >= 0 || source->v.width != store->v.width ||
        (store->v.param && !source->v.param)) {
        return fail(XQ_ERR_ARGUMENT,
                    "xq_store_map: values of width %d, owner %d, source %d; the layer's have width %d and source %d; "
                    "the source's must be as wide, sealed, with own codes and no map",
                    source->v.width, plan.owner, plan.source, store->v.width, store->v.plan.source);
    }
    store->mapped = 1;
    store->source = source->v;
    xq_side_store &source_side = store->source; // of which codes alone are read
    source_side.rows = source_side.stage = nullptr;
    source_side.rows_head = source_side.rows_stream = source_side.stage_head = 0;
    source_side.bytes = nullptr;
    source_side.bytes_slot = source_side.bytes_head = source_side.bytes_stream = 0;
    store->map_heads = heads;
    store->map = map;
    return XQ_OK;
}

int64_t xq_attend_states(const xq_store *store, const xq_attend_args *args) {
    if (!none_null("xq_attend_states", {{"store", store}, {"args", args}}) ||
        !in_range("xq_attend_states", {{"n_parts", args->n_parts, 1, INT16_MAX},
                                       {"n_streams", args->n_streams, 1, store->n_streams},
                                       {"n_tokens", args->n_tokens, 1, INT32_MAX},
                                       {"n_head", args->n_head, 1, INT32_MAX}})) {
        return XQ_ERR_ARGUMENT;
    }
    const int64_t n_tokens = (int64_t)args->n_streams * args->n_tokens;
    if (!in_range("xq_attend_states", {{"n_streams * n_tokens", n_tokens, 1, INT32_MAX},
                                       {"n_streams * n_tokens * n_head", n_tokens * args->n_head, 1, INT32_MAX}})) {
        return XQ_ERR_ARGUMENT;
    }
    return args->n_parts * n_tokens * args->n_head * state_width(*store);
}
