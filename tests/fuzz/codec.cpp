/* codec.cpp: fuzz target: the C ABI of libxquant: plans as text and as numbers, sealing, unsealing, attention.
 *
 * Pointers are what xquant.h says of them and as long as it says, each in memory of its own; everything else is taken
 * from the input: fields of sides, widths, codes and parameters as a state could bring them, F16 rows, masks.  What is
 * accepted must keep within its buffers; all kernel sets must store the same bytes.
 */
#include "fuzz.h"

#include "xquant.h"

#include <fuzzer/FuzzedDataProvider.h>

#include <cstring>
#include <memory>

namespace {

using input = FuzzedDataProvider;

/* Mostly a number of a list, sometimes any. */
int32_t number(input &in, std::initializer_list<int32_t> usual) {
    const auto which = in.ConsumeIntegralInRange<size_t>(0, usual.size());
    return which < usual.size() ? usual.begin()[which] : in.ConsumeIntegral<int32_t>();
}

float real(input &in, std::initializer_list<float> usual) {
    const auto which = in.ConsumeIntegralInRange<size_t>(0, usual.size());
    return which < usual.size() ? usual.begin()[which] : in.ConsumeFloatingPoint<float>();
}

xq_side side(input &in, bool is_k) {
    xq_side s = {};
    s.bits = number(in, {0, 1, 2, 3, 4});
    s.group = number(in, {32, 64, 128, is_k ? 32 : 0});
    s.fit = number(in, {0, 1, 2, 3, 4});
    s.param = number(in, {0, 1});
    s.rotate = number(in, {0, is_k ? 0 : 1});
    s.owner = number(in, {-1, -1, -1, 0});
    s.source = number(in, {-1, -1, -1, is_k ? -1 : 0});
    s.eta = real(in, {0.0f, 0.09f, 0.3f});
    return s;
}

int32_t width(input &in) {
    return number(in, {16, 64, 96, 512});
}

/* n elements of their own, from the input as far as it goes, then repeated: reading past the end is seen. */
template <typename T> std::unique_ptr<T[]> block(input &in, int64_t n) {
    std::unique_ptr<T[]> out(new T[(size_t)std::max<int64_t>(n, 1)]());
    const auto bytes = in.ConsumeBytes<uint8_t>(in.ConsumeIntegralInRange<size_t>(0, 256));
    for (size_t i = 0; i < (size_t)std::max<int64_t>(n, 0) * sizeof(T) && !bytes.empty(); ++i) {
        ((uint8_t *)out.get())[i] = bytes[i % bytes.size()];
    }
    return out;
}

/* ---- plans ---- */

void text(input &in) {
    xq_layer layer, again;
    const std::string words = in.ConsumeRandomLengthString(300);
    if (xq_layer_parse(words.c_str(), &layer) != XQ_OK) {
        fuzz::check(*xq_error() != '\0', "an error has a message");
        return;
    }
    char out[256];
    fuzz::check(xq_layer_format(&layer, out, sizeof(out)) == XQ_OK, "what was parsed can be written");
    fuzz::check(xq_layer_parse(out, &again) == XQ_OK, "and parsed");
    fuzz::check(layer.k.eta != layer.k.eta || layer.v.eta != layer.v.eta || memcmp(&layer, &again, sizeof(layer)) == 0,
                "and is the same");
}

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
        fuzz::check(layer.k.owner < l && layer.v.owner < l && layer.v.source < l, "only earlier layers are read");
        xq_block_layout layout;
        fuzz::check(xq_block_layout_of(&layer, d[l], e[l], &layout) == XQ_OK, "a checked layer has a layout");
        fuzz::check(layout.bytes > 0 && layout.bytes % 64 == 0, "of whole units");
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

const char *const sets[] = {"scalar", nullptr}; // null: the best there is

void force(const char *name) {
    static const std::string best = xq_kernels();
    xq_kernels_force(name ? name : best.c_str());
}

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
        fuzz::check(n.param > 0, "only what has a layout is sealed");
        const std::unique_ptr<uint16_t[]> back(new uint16_t[(size_t)XQ_PAGE * w]);
        const uint8_t *read = mine ? mine : borrowed;
        const int unsealed = is_k ? xq_unseal_k(&s, w, read, s.bits, param[i].get(), back.get(), w)
                                  : xq_unseal_v(&s, w, read, s.bits, param[i].get(), back.get(), w, predicted.get());
        fuzz::check(unsealed == XQ_OK, "what was sealed can be unsealed");
    }
    fuzz::check(status[0] == status[1], "all kernel sets agree");
    fuzz::check(memcmp(codes[0].get(), codes[1].get(), (size_t)n.codes) == 0, "on codes");
    fuzz::check(memcmp(param[0].get(), param[1].get(), (size_t)n.param) == 0, "and parameters");
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
            fuzz::check(xq_unpack(bits, n_i, n_j, packed.get(), back.get()) == XQ_OK, "what was packed is unpacked");
            fuzz::check(memcmp(codes.get(), back.get(), (size_t)n_i * n_j) == 0, "to the same");
        }
    }
}

/* ---- attention ---- */

/* Codes and parameters of n pages of one side, as long as they must be; any bytes. */
struct pages {
    std::unique_ptr<uint8_t[]> codes, param;
    sizes n;
    pages(input &in, const xq_side &s, bool is_k, int32_t width, int n_pages) : n(s, is_k, width) {
        codes = block<uint8_t>(in, n.codes * n_pages);
        param = block<uint8_t>(in, n.param * n_pages);
    }
};

void attend(input &in) {
    constexpr int n_slots = 2;
    xq_attention a = {};
    a.d = width(in);
    a.e = width(in);
    a.k = side(in, true);
    a.v = side(in, false);
    a.source = side(in, false);
    a.mapped = number(in, {0, 1});
    const bool valid = a.d >= 16 && a.d <= XQ_MAX_HEAD_DIM && a.e >= 16 && a.e <= XQ_MAX_HEAD_DIM;
    const int32_t d = valid ? a.d : 16, e = valid ? a.e : 16;
    const int n_pages = in.ConsumeIntegralInRange<int>(0, 4);
    const pages k(in, a.k, true, d, n_pages), v(in, a.v, false, e, n_pages), source(in, a.source, false, e, n_pages);
    // a side that has no layout comes without bytes: it must not be read
    const auto set = [](const pages &p, const uint8_t *&codes, const uint8_t *&param, int64_t &codes_stride,
                        int64_t &param_stride) {
        codes = p.n.codes > 0 ? p.codes.get() : nullptr;
        param = p.n.param > 0 ? p.param.get() : nullptr;
        codes_stride = p.n.codes;
        param_stride = p.n.param;
    };
    set(k, a.k_codes, a.k_param, a.k_codes_stride, a.k_param_stride);
    set(v, a.v_codes, a.v_param, a.v_codes_stride, a.v_param_stride);
    set(source, a.source_codes, a.source_param, a.source_codes_stride, a.source_param_stride);
    a.k_code_bits = number(in, {a.k.bits, a.k.bits, a.k.bits});
    a.v_code_bits = number(in, {a.v.bits, a.v.bits, a.v.bits});

    std::vector<int32_t> slots((size_t)n_pages);
    for (int32_t &slot : slots) {
        slot = in.ConsumeIntegralInRange<int32_t>(-2, n_slots - 1);
    }
    const auto k_window = block<uint16_t>(in, (int64_t)n_slots * XQ_PAGE * d);
    const auto v_window = block<uint16_t>(in, (int64_t)n_slots * XQ_PAGE * e);
    a.k_window = k_window.get();
    a.v_window = v_window.get();
    const int32_t none = 0;
    a.page_slot = n_pages > 0 ? slots.data() : &none;
    a.page_begin = in.ConsumeIntegralInRange<int32_t>(-1, n_pages);
    a.page_end = in.ConsumeIntegralInRange<int32_t>(-1, n_pages);

    const int n_rows = in.ConsumeIntegralInRange<int>(0, 70);
    a.n_rows = n_rows;
    std::vector<std::unique_ptr<float[]>> q, partial;
    std::vector<std::unique_ptr<uint16_t[]>> mask;
    std::vector<const float *> q_rows;
    std::vector<const uint16_t *> mask_rows;
    std::vector<float *> partial_rows;
    const int state = (a.mapped ? 3 : 2) * e + 2;
    for (int i = 0; i < n_rows; ++i) {
        if (i < 3) {
            q.push_back(block<float>(in, d));
            mask.push_back(block<uint16_t>(in, (int64_t)n_pages * XQ_PAGE));
        }
        q_rows.push_back(q[(size_t)i % q.size()].get());
        mask_rows.push_back(mask[(size_t)i % mask.size()].get());
        partial.emplace_back(new float[(size_t)state]);
        partial_rows.push_back(partial.back().get());
    }
    const auto slope = block<float>(in, n_rows);
    a.q = n_rows > 0 ? q_rows.data() : (const float *const *)&none;
    a.mask = n_rows > 0 && in.ConsumeBool() ? mask_rows.data() : nullptr;
    a.slope = in.ConsumeBool() ? slope.get() : nullptr;
    a.partial = n_rows > 0 ? partial_rows.data() : (float *const *)&none;
    a.scale = real(in, {0.125f, 1.0f});
    a.softcap = real(in, {0.0f, 0.0f, 30.0f});
    const auto weight = block<float>(in, (int64_t)e * e);
    const std::unique_ptr<float[]> out(new float[(size_t)e]);
    for (const char *name : sets) {
        force(name);
        if (xq_attend(&a) == XQ_OK && n_rows > 0) {
            fuzz::check(xq_attention_merge(n_rows, partial_rows.data(), e, number(in, {0, 1}), real(in, {-1e9f, 0.0f}),
                                           a.mapped ? weight.get() : nullptr, out.get()) == XQ_OK,
                        "states merge");
        }
    }
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    input in(data, size);
    switch (in.ConsumeIntegralInRange<int>(0, 4)) {
    case 0:
        text(in);
        break;
    case 1:
        plan(in);
        break;
    case 2:
        seal(in);
        break;
    case 3:
        pack(in);
        break;
    default:
        attend(in);
    }
    return 0;
}
