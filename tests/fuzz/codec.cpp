/* codec.cpp: fuzz target: the C ABI of libxquant: plans as text and as numbers, sealing and unsealing, and the verbs.
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
    const auto which = in.ConsumeIntegralInRange<size_t>(0, 31);
    return which < 31 ? usual.begin()[which % usual.size()] : in.ConsumeIntegral<int32_t>();
}

float real(input &in, std::initializer_list<float> usual) {
    const auto which = in.ConsumeIntegralInRange<size_t>(0, 31);
    return which < 31 ? usual.begin()[which % usual.size()] : in.ConsumeFloatingPoint<float>();
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

/* ---- verbs ---- */

/* Blocks and rows of one layer, as long as they must be: any bytes, as a loaded state could bring them. */
struct layer_store {
    std::unique_ptr<uint8_t[]> blocks;
    std::unique_ptr<uint16_t[]> rows;
    int64_t n_blocks, n_rows; /* bytes of all streams */
    xq_store c;
    int status;

    layer_store(input &in, const xq_layer &layer, const xq_shape &shape) {
        const int64_t of_stream = xq_store_block_bytes(&layer, &shape), rows_of_stream = xq_store_row_bytes(&shape);
        const bool fits = of_stream > 0 && rows_of_stream > 0 && of_stream * shape.n_streams < 1 << 22 &&
                          rows_of_stream * shape.n_streams < 1 << 22;
        n_blocks = fits ? of_stream * shape.n_streams : 0;
        n_rows = fits ? rows_of_stream * shape.n_streams : 0;
        blocks = block<uint8_t>(in, n_blocks);
        rows = block<uint16_t>(in, n_rows / 2);
        const bool seals = in.ConsumeIntegralInRange<int>(0, 7) > 0;
        status =
            xq_store_init(&c, &layer, &shape, seals ? blocks.get() : nullptr, of_stream, rows.get(), rows_of_stream);
        fuzz::check(status == XQ_OK || *xq_error() != '\0', "an error has a message");
        status = fits ? status : XQ_ERR_ARGUMENT;
    }
};

/* Runs a verb as three threads would, one after the other: none waits for another. */
template <typename A>
int run(int (*verb)(const xq_store *, const A *, const xq_exec *), const xq_store &store, const A &args) {
    int statuses[3];
    for (int32_t i = 0; i < 3; ++i) {
        const xq_exec exec = {i, 3, nullptr};
        statuses[i] = verb(&store, &args, &exec);
    }
    fuzz::check(statuses[0] == statuses[1] && statuses[0] == statuses[2], "all threads refuse a call, or none");
    return statuses[0];
}

/* A list of moves, mostly of pages and slots that there are. */
std::vector<int32_t> moves(input &in, const xq_store &s, bool may_seal) {
    std::vector<int32_t> out;
    for (int n = in.ConsumeIntegralInRange<int>(0, 3); n > 0; --n) {
        out.push_back(number(in, {0, 0, s.n_streams - 1}));
        out.push_back(number(in, {0, s.n_pages - 1, s.n_pages - 1}));
        out.push_back(number(in, {0, s.n_slots - 1, may_seal ? XQ_SLOT_SEALED : 0}));
        for (int i = 0; i < 4; ++i) {
            out.push_back(in.ConsumeIntegral<int32_t>());
        }
    }
    return out;
}

void update(input &in, const xq_store &s) {
    const auto seals = moves(in, s, false), unseals = moves(in, s, false);
    std::vector<int32_t> rows;
    for (int n = in.ConsumeIntegralInRange<int>(0, 3); n > 0; --n) {
        rows.push_back(number(in, {0, 5, s.n_streams * s.n_slots * XQ_PAGE - 1}));
    }
    uint64_t n_nonfinite = 0;
    xq_update_args a = {};
    a.seals = seals.data();
    a.unseals = unseals.data();
    a.rows = rows.data();
    a.n_seals = (int32_t)(seals.size() / XQ_MOVE_WORDS);
    a.n_unseals = (int32_t)(unseals.size() / XQ_MOVE_WORDS);
    a.n_tokens = (int32_t)rows.size();
    if (in.ConsumeBool()) {
        (in.ConsumeBool() ? a.n_seals : a.n_tokens) = 0;
    }
    if (in.ConsumeBool()) {
        a.n_unseals = 0;
    }
    const auto k = block<float>(in, (int64_t)rows.size() * s.n_head_kv * s.k.width);
    const auto v = block<float>(in, (int64_t)rows.size() * s.n_head_kv * s.v.width);
    a.k_cur = k.get();
    a.v_cur = v.get();
    a.k_head_stride = 4 * s.k.width;
    a.v_head_stride = 4 * s.v.width;
    a.k_token_stride = a.k_head_stride * s.n_head_kv;
    a.v_token_stride = a.v_head_stride * s.n_head_kv;
    a.n_nonfinite = in.ConsumeIntegralInRange<int>(0, 7) > 0 ? &n_nonfinite : nullptr;
    run(xq_cpu()->update, s, a);
}

void keys(input &in, const xq_store &s) {
    const auto pages = moves(in, s, true);
    xq_keys_args a = {};
    a.pages = pages.data();
    a.n_pages = (int32_t)(pages.size() / XQ_MOVE_WORDS);
    a.head_stride = 4 * s.k.width;
    a.token_stride = a.head_stride * s.n_head_kv;
    const auto data = block<float>(in, (int64_t)a.n_pages * XQ_PAGE * s.n_head_kv * s.k.width);
    a.keys = data.get();
    if (in.ConsumeBool()) {
        run(xq_cpu()->read_keys, s, a);
    }
    run(xq_cpu()->write_keys, s, a);
}

/* [stream][page]: mostly slots that there are. */
std::vector<int32_t> table(input &in, const xq_store &s) {
    std::vector<int32_t> out;
    for (int32_t i = 0; i < s.n_streams * s.n_pages; ++i) {
        out.push_back(number(in, {XQ_SLOT_SEALED, XQ_SLOT_SEALED, XQ_SLOT_NONE, 0, s.n_slots - 1}));
    }
    return out;
}

void attend(input &in, const xq_store &s) {
    const auto slots = table(in, s);
    const int32_t first = number(in, {0, 0, s.n_streams - 1});
    const int32_t n_rep = in.ConsumeIntegralInRange<int32_t>(1, 3);
    xq_attend_args a = {};
    a.table = slots.data();
    a.first_stream = in.ConsumeBool() ? &first : nullptr;
    a.n_head = number(in, {s.n_head_kv * n_rep, s.n_head_kv * n_rep, s.n_head_kv * n_rep});
    a.n_tokens = in.ConsumeIntegralInRange<int32_t>(0, 40);
    a.n_streams = number(in, {1, 1, s.n_streams});
    a.n_kv_pages = number(in, {s.n_pages, s.n_pages, s.n_pages, 0});
    a.n_parts = number(in, {1, 2, 3});
    a.scale = real(in, {0.125f, 1.0f});
    a.softcap = real(in, {0.0f, 0.0f, 30.0f});
    a.max_bias = real(in, {0.0f, 8.0f});
    const int64_t n_states = xq_attend_states(&s, &a);
    if (n_states < 0 || n_states > 1 << 22 || a.n_kv_pages > s.n_pages || a.n_kv_pages < 0) {
        a.n_tokens = 0; // is refused, and needs no memory
    }
    const int64_t n_tokens = a.n_tokens > 0 ? (int64_t)a.n_streams * a.n_tokens : 0;
    const int64_t n_cells = n_tokens > 0 ? (int64_t)a.n_kv_pages * XQ_PAGE : 0;
    const auto q = block<float>(in, n_tokens * a.n_head * s.k.width), sinks = block<float>(in, n_tokens * a.n_head);
    const auto mask = block<uint16_t>(in, n_tokens * n_cells);
    const std::unique_ptr<float[]> partial(new float[(size_t)(n_tokens > 0 ? n_states : 1)]);
    const std::unique_ptr<float[]> out(new float[(size_t)(n_tokens * a.n_head * s.v.width) + 1]);
    const int64_t n_groups = (a.n_tokens * (int64_t)n_rep + XQ_CPU_GROUP_ROWS - 1) / XQ_CPU_GROUP_ROWS;
    std::vector<uint32_t> arrivals((size_t)(n_tokens > 0 ? a.n_streams * n_groups * s.n_head_kv : 1));
    a.q = q.get();
    a.q_head_stride = 4 * s.k.width;
    a.q_token_stride = a.q_head_stride * a.n_head;
    a.mask = in.ConsumeBool() ? mask.get() : nullptr;
    a.mask_token_stride = 2 * n_cells;
    a.mask_stream_stride = a.mask_token_stride * a.n_tokens;
    a.sinks = in.ConsumeBool() ? sinks.get() : nullptr;
    a.partial = partial.get();
    a.arrivals = arrivals.data();
    a.out = out.get();
    run(xq_cpu()->attend, s, a);
    for (const uint32_t n : arrivals) {
        fuzz::check(n == 0, "counters are 0 again");
    }
}

void unpack(input &in, const xq_store &s) {
    const auto slots = table(in, s);
    xq_unpack_args a = {};
    a.table = slots.data();
    a.n_streams = number(in, {1, s.n_streams});
    a.n_kv_pages = number(in, {s.n_pages, 1});
    a.is_k = number(in, {0, 1});
    a.first_head = number(in, {0, 0, s.n_head_kv - 1});
    a.n_heads = number(in, {1, s.n_head_kv});
    const bool valid = a.n_streams > 0 && a.n_streams <= s.n_streams && a.n_kv_pages > 0 && a.n_kv_pages <= s.n_pages &&
                       a.n_heads > 0 && a.n_heads <= s.n_head_kv;
    const int64_t n = valid ? (int64_t)a.n_streams * a.n_kv_pages * XQ_PAGE * a.n_heads : 0;
    const std::unique_ptr<uint16_t[]> rows(new uint16_t[(size_t)(n * (a.is_k ? s.k.width : s.v.width)) + 1]);
    a.rows = rows.get();
    run(xq_cpu()->unpack, s, a);
}

/* A layer and what it reads, and a few verbs on it: by each kernel set on its own copy, with the same bytes at the end.
 */
void verbs(input &in) {
    const xq_layer layer = {side(in, true), side(in, false)};
    const xq_shape shape = {width(in),
                            width(in),
                            number(in, {1, 2, 2, 1}),
                            number(in, {1, 3, 3}),
                            number(in, {1, 2, 2}),
                            number(in, {1, 1, 2})};
    xq_layer read = layer;
    read.k.owner = read.v.owner = read.v.source = -1;
    for (xq_side *side : {&read.k, &read.v}) {
        side->fit = side->fit == XQ_FIT_LSQ ? XQ_FIT_MINMAX : side->fit;
    }
    layer_store own(in, layer, shape), other(in, read, shape);
    if (own.status != XQ_OK || other.status != XQ_OK) {
        return;
    }
    const std::vector<int32_t> heads((size_t)shape.n_head_kv, shape.n_head_kv - 1);
    const auto map = block<float>(in, (int64_t)shape.n_head_kv * shape.e * shape.e);
    for (const int32_t is_k : {0, 1}) {
        if (in.ConsumeIntegralInRange<int>(0, 7) > 0) {
            xq_store_borrow(&own.c, is_k, &other.c);
        }
    }
    if (in.ConsumeIntegralInRange<int>(0, 7) > 0) {
        xq_store_map(&own.c, &other.c, heads.data(), map.get());
    }
    const auto rest = in.ConsumeRemainingBytes<uint8_t>();
    const std::vector<uint8_t> blocks(own.blocks.get(), own.blocks.get() + own.n_blocks);
    const std::vector<uint16_t> rows(own.rows.get(), own.rows.get() + own.n_rows / 2);
    std::vector<uint8_t> after[2];
    for (int i = 0; i < 2; ++i) {
        force(sets[i]);
        std::copy(blocks.begin(), blocks.end(), own.blocks.get());
        std::copy(rows.begin(), rows.end(), own.rows.get());
        input again(rest.data(), rest.size());
        for (int n = again.ConsumeIntegralInRange<int>(1, 4); n > 0; --n) {
            const auto verb = again.PickValueInArray({update, attend, unpack, keys});
            verb(again, own.c);
        }
        after[i].assign(own.blocks.get(), own.blocks.get() + own.n_blocks);
        after[i].insert(after[i].end(), (uint8_t *)own.rows.get(), (uint8_t *)own.rows.get() + own.n_rows);
    }
    fuzz::check(after[0] == after[1], "all kernel sets store the same");
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
        verbs(in);
    }
    return 0;
}
