/* xquant-update.cpp: the operation that changes pages: seals, unseals, and writes the rows of a micro-batch.
 *
 * Each side of each KV head of a layer is one task; what a task does to a page, it does alone.
 */
#include "xquant-cache.h"

#include "ggml-cpu.h"

namespace xquant {

using layer = cache::layer;

/* One side (keys or values) of one KV head of a layer: what update works on. */
struct side {
    const layer &l, &owner;
    const ggml_tensor *blocks, *codes, *window; /* codes: blocks of the owner */
    const xq_side &plan;
    int32_t codes_at, param_at; /* offsets in a block */
    int32_t owner_bits, width, head;
    int64_t first, slot;       /* of the head's rows in a stream's window; elements of a slot */
    const ggml_tensor *source; /* blocks that a map reads; null: not mapped */

    uint8_t *codes_of(int stream, int page) const { return part(block_of(owner, codes, stream, head, page), codes_at); }
    uint8_t *param_of(int stream, int page) const { return part(block_of(l, blocks, stream, head, page), param_at); }
    ggml_fp16_t *rows_of(int stream, int at) const { return window_of(window, stream) + first + at * slot; }
};

static side key_side(const layer &l, const ggml_tensor *blocks, const ggml_tensor *window, const ggml_tensor *codes,
                     int head) {
    const layer &owner = *l.k_owner;
    return {l,
            owner,
            blocks,
            codes,
            window,
            l.plan.k,
            owner.layout.k_codes,
            l.layout.k_param,
            owner.plan.k.bits,
            l.d,
            head,
            l.k_window(head),
            l.k_slot(),
            nullptr};
}

static side value_side(const layer &l, const ggml_tensor *blocks, const ggml_tensor *window, const ggml_tensor *codes,
                       const ggml_tensor *source, int head) {
    const layer &owner = *l.v_owner;
    return {l,
            owner,
            blocks,
            codes,
            window,
            l.plan.v,
            owner.layout.v_codes,
            l.layout.v_param,
            owner.plan.v.bits,
            l.e,
            head,
            l.v_window(head),
            l.v_slot(),
            l.map ? source : nullptr};
}

/* What the map of a side says a page's values are, in `out`; null: not mapped. */
static const float *predict(const side &x, int stream, int page, std::vector<float> &out) {
    if (!x.source) {
        return nullptr;
    }
    out.resize((size_t)x.width * XQ_PAGE);
    const layer &source = *x.l.v_source;
    uint8_t *block = block_of(source, x.source, stream, x.l.map->heads[x.head], page);
    const int status = xq_predict_v(&source.plan.v, x.width, part(block, source.layout.v_codes),
                                    part(block, source.layout.v_param), x.l.weight(x.head), out.data());
    GGML_ASSERT(status == XQ_OK);
    return out.data();
}

static void unseal_page(const side &x, bool is_k, int stream, int page, ggml_fp16_t *rows,
                        std::vector<float> &scratch) {
    const uint8_t *codes = x.codes_of(stream, page), *param = x.param_of(stream, page);
    const int status = is_k ? xq_unseal_k(&x.plan, x.width, codes, x.owner_bits, param, rows, x.width)
                            : xq_unseal_v(&x.plan, x.width, codes, x.owner_bits, param, rows, x.width,
                                          predict(x, stream, page, scratch));
    GGML_ASSERT(status == XQ_OK);
}

/* Seals, then unseals, the pages of the input. */
static void move_pages(const side &x, const int32_t *input, const input_layout &at) {
    const bool own = &x.owner == &x.l, is_k = &x.plan == &x.l.plan.k;
    std::vector<float> scratch;
    const auto *seals = (const seal_op *)(input + at.seals);
    for (int i = 0; i < input[in_n_seal]; ++i) {
        const auto &op = seals[i];
        ggml_fp16_t *rows = x.rows_of(op.stream, op.slot);
        uint8_t *codes = x.codes_of(op.stream, op.page), *param = x.param_of(op.stream, op.page);
        uint8_t *mine = own ? codes : nullptr, *borrowed = own ? nullptr : codes;
        const int n = is_k ? xq_seal_k(&x.plan, x.width, rows, x.width, op.valid, mine, param, borrowed, x.owner_bits)
                           : xq_seal_v(&x.plan, x.width, rows, x.width, op.valid, mine, param, borrowed, x.owner_bits,
                                       predict(x, op.stream, op.page, scratch));
        GGML_ASSERT(n >= 0);
        *x.l.n_nonfinite += (uint64_t)n;
    }
    const auto *unseals = (const unseal_op *)(input + at.unseals);
    for (int i = 0; i < input[in_n_unseal]; ++i) {
        const auto &op = unseals[i];
        unseal_page(x, is_k, op.stream, op.page, x.rows_of(op.stream, op.slot), scratch);
    }
}

/* cur F32 [width, KV head, token] to the window rows that the input names. */
static void write_rows(const side &x, const ggml_tensor *cur, const int32_t *input, const input_layout &at) {
    const int32_t rows = x.l.n_slots * XQ_PAGE; // of a stream
    for (int t = 0; t < input[in_n_rows]; ++t) {
        const int32_t row = input[at.rows + t];
        const float *src = (const float *)((const char *)cur->data + x.head * cur->nb[1] + t * cur->nb[2]);
        ggml_cpu_fp32_to_fp16(src, x.rows_of(row / rows, 0) + (int64_t)(row % rows) * x.width, x.width);
    }
}

void update_pages(ggml_tensor *dst, int ith, int nth, void *userdata) {
    layer &l = *(layer *)userdata;
    const ggml_tensor *window = dst->src[0], *k_cur = dst->src[2], *v_cur = dst->src[3], *blocks = dst->src[4];
    const ggml_tensor *k_codes = dst->src[5], *v_codes = dst->src[6], *source = dst->src[7];
    const int32_t *input = (const int32_t *)dst->src[1]->data;
    const auto at = l.home->layout_of(k_cur->ne[2]);
    // each side of each KV head is one task: nothing is shared between them
    for (int task = ith; task < 2 * l.n_head_kv; task += nth) {
        const int head = task / 2;
        const side x = task % 2 == 0 ? key_side(l, blocks, window, k_codes, head)
                                     : value_side(l, blocks, window, v_codes, source, head);
        move_pages(x, input, at);
        write_rows(x, task % 2 == 0 ? k_cur : v_cur, input, at);
    }
    if (ith == 0) {
        l.done = (uint64_t)input[in_epoch];
    }
}

/* What update would have done to a layer, less the rows, for a micro-batch that was aborted before it got there. */
void cache::run_pending(const layer &l) const {
    const input_layout at = layout_of(0);
    std::vector<int32_t> input(at.size);
    fill_operations(input.data(), at);
    for (int head = 0; head < l.n_head_kv; ++head) {
        move_pages(key_side(l, l.blocks, l.window, l.k_owner->blocks, head), input.data(), at);
        move_pages(value_side(l, l.blocks, l.window, l.v_owner->blocks, l.v_source->blocks, head), input.data(), at);
    }
}

void cache::finish_interrupted() {
    for (auto &l : layers_) {
        // what other devices were given, they finish
        if (!l->extra && (uint32_t)l->done != (uint32_t)epoch) {
            run_pending(*l);
            l->done = epoch;
        }
    }
}

} // namespace xquant
