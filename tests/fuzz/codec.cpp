/* codec.cpp: fuzz target: plans, and the codec's functions: sealing, unsealing, packing.
 *
 * Fields of sides, widths, codes and parameters as a state could bring them, F16 rows.  What is accepted must keep
 * within its buffers; all kernel sets must store the same bytes.
 */
#include "layers.h"

using namespace fuzz;

namespace {

/* ---- plans ---- */

void plan(input &in) {
    auto p = std::make_unique<xq_plan>();
    const auto n = in.ConsumeIntegralInRange<int32_t>(0, 6);
    p->n_layers = number(in, {n, n, n, n});
    p->window = number(in, {-1, 0, 128});
    p->pinned = number(in, {0, 1});
    int32_t d[XQ_MAX_LAYERS] = {}, e[XQ_MAX_LAYERS] = {};
    for (int32_t l = 0; l < n; ++l) {
        p->layers[l] = {side(in, true), side(in, false)};
        d[l] = number(in, {64, 64, 0});
        e[l] = number(in, {64, 64, d[l]});
    }
    const bool widths = in.ConsumeBool();
    if (xq_plan_check(p.get(), widths ? d : nullptr, widths ? e : nullptr) != XQ_OK || !widths) {
        return;
    }
    for (int32_t l = 0; l < p->n_layers; ++l) {
        if (d[l] == 0) {
            continue;
        }
        const xq_layer &layer = p->layers[l];
        check(layer.k.owner < l && layer.v.owner < l && layer.v.source < l, "only earlier layers are read");
        xq_block_layout layout;
        check(xq_block_layout_of(&layer, d[l], e[l], &layout) == XQ_OK, "a checked layer has a layout");
        check(layout.bytes > 0 && layout.bytes % 64 == 0, "of whole units");
    }
}

/* ---- codec ---- */

/* Bytes of the parts of one side of a block; none if there is no such block. */
struct sizes {
    int64_t codes = 0, param = 0;
    sizes(const xq_side &s, bool is_k, int32_t width) {
        xq_side other = {0, is_k ? 0 : 128, XQ_FIT_MINMAX, XQ_PARAM_F16, 0, -1, -1, 0.0f};
        const xq_layer layer = {is_k ? s : other, is_k ? other : s};
        xq_block_layout at;
        if (xq_check_side(&s, is_k, width) != XQ_OK ||
            xq_block_layout_of(&layer, is_k ? width : 16, is_k ? 16 : width, &at) != XQ_OK) {
            return;
        }
        codes = s.bits == 0 ? 0 : xq_packed_bytes(s.bits, is_k ? width : XQ_PAGE, is_k ? XQ_PAGE : width);
        param = is_k ? (at.v_codes >= 0 ? at.v_codes : at.v_param) - at.k_param : at.bytes - at.v_param;
    }
};

void seal(input &in) {
    const bool is_k = in.ConsumeBool();
    const xq_side s = side(in, is_k);
    const int32_t w = width(in);
    const bool valid_width = w >= 16 && w <= XQ_MAX_HEAD_DIM;
    const int64_t stride = in.ConsumeBool() ? w : (int64_t)w + in.ConsumeIntegralInRange<int32_t>(-8, 40);
    const sizes n(s, is_k, w);
    const int64_t n_rows = valid_width ? (XQ_PAGE - 1) * std::max<int64_t>(stride, w) + w : 0;
    const auto rows = block<uint16_t>(in, n_rows);
    const uint32_t valid[4] = {in.ConsumeIntegral<uint32_t>(), ~0u, in.ConsumeIntegral<uint32_t>(), 0};
    const auto owner = block<uint8_t>(in, n.codes);
    std::unique_ptr<float[]> predicted;
    if (valid_width && !is_k && s.source >= 0) {
        const xq_side from = side(in, false);
        const sizes m(from, false, w);
        const auto source_codes = block<uint8_t>(in, m.codes), source_param = block<uint8_t>(in, m.param);
        const auto weight = block<float>(in, (int64_t)w * w);
        predicted.reset(new float[(size_t)w * XQ_PAGE]);
        force(sets[0]);
        if (m.param == 0 ||
            xq_predict_v(&from, w, source_codes.get(), source_param.get(), weight.get(), predicted.get()) != XQ_OK) {
            predicted.reset();
        }
    }
    std::unique_ptr<uint8_t[]> codes[2], param[2];
    int status[2];
    for (int i = 0; i < 2; ++i) {
        force(sets[i]);
        codes[i].reset(new uint8_t[(size_t)n.codes + 1]());
        param[i].reset(new uint8_t[(size_t)n.param + 1]());
        // a side without codes reads, and writes, none
        uint8_t *mine = s.owner < 0 && n.codes > 0 ? codes[i].get() : nullptr;
        const uint8_t *borrowed = s.owner >= 0 && n.codes > 0 ? owner.get() : nullptr;
        status[i] =
            is_k ? xq_seal_k(&s, w, rows.get(), stride, valid, mine, param[i].get(), borrowed, s.bits)
                 : xq_seal_v(&s, w, rows.get(), stride, valid, mine, param[i].get(), borrowed, s.bits, predicted.get());
        if (status[i] < 0) {
            continue;
        }
        check(n.param > 0, "only what has a layout is sealed");
        const std::unique_ptr<uint16_t[]> back(new uint16_t[(size_t)XQ_PAGE * w]);
        const uint8_t *read = mine ? mine : borrowed;
        const int unsealed = is_k ? xq_unseal_k(&s, w, read, s.bits, param[i].get(), back.get(), w)
                                  : xq_unseal_v(&s, w, read, s.bits, param[i].get(), back.get(), w, predicted.get());
        check(unsealed == XQ_OK, "what was sealed can be unsealed");
    }
    check(status[0] == status[1], "all kernel sets agree");
    check(memcmp(codes[0].get(), codes[1].get(), (size_t)n.codes) == 0, "on codes");
    check(memcmp(param[0].get(), param[1].get(), (size_t)n.param) == 0, "and parameters");
}

void pack(input &in) {
    const int32_t bits = number(in, {1, 2, 3, 4}), n_i = number(in, {16, 128, 64}), n_j = number(in, {16, 128, 512});
    const int64_t bytes = xq_packed_bytes(bits, n_i, n_j);
    if (bytes < 0 || bytes > 1 << 20) {
        return;
    }
    const auto codes = block<uint8_t>(in, (int64_t)n_i * n_j);
    const std::unique_ptr<uint8_t[]> packed(new uint8_t[(size_t)bytes]);
    for (int i = 0; i < 2; ++i) {
        force(sets[i]);
        if (xq_pack(bits, n_i, n_j, codes.get(), packed.get()) == XQ_OK) {
            const std::unique_ptr<uint8_t[]> back(new uint8_t[(size_t)n_i * n_j]);
            check(xq_unpack(bits, n_i, n_j, packed.get(), back.get()) == XQ_OK, "what was packed is unpacked");
            check(memcmp(codes.get(), back.get(), (size_t)n_i * n_j) == 0, "to the same");
        }
    }
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    input in(data, size);
    switch (in.ConsumeIntegralInRange<int>(0, 3)) {
    case 0:
        plan(in);
        break;
    case 1:
        seal(in);
        break;
    default:
        pack(in);
    }
    return 0;
}
