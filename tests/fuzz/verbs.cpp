/* verbs.cpp: fuzz target: the five verbs over a layer of any bytes, as a loaded state could bring them.
 *
 * Tables, moves, rows, masks and counts are mostly such as there are, and sometimes any.  What is accepted must keep
 * within its buffers; a call is refused by all threads or by none; all kernel sets must store the same bytes.
 */
#include "layers.h"

using namespace fuzz;

namespace {

/* Blocks and rows of one layer, as long as they must be: any bytes, as a loaded state could bring them. */
struct layer_store {
    std::unique_ptr<uint8_t[]> blocks;
    std::unique_ptr<uint16_t[]> rows, stage;
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
        check(status == XQ_OK || *xq_error() != '\0', "an error has a message");
        status = fits ? status : XQ_ERR_ARGUMENT;
        if (const int32_t n = number(in, {0, 1, 2, 2}); status == XQ_OK && n > 0 && n < 8) {
            xq_shape slot = shape;
            slot.n_slots = 1;
            slot.n_bytes = 0;
            stage = block<uint16_t>(in, xq_store_row_bytes(&slot) / 2 * n);
            check(xq_store_stage(&c, stage.get(), n) == XQ_OK, "a stage is accepted");
        }
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
    check(statuses[0] == statuses[1] && statuses[0] == statuses[2], "all threads refuse a call, or none");
    return statuses[0];
}

/* A list of moves, mostly of pages and slots that there are.  small: a slot may be where pages get smaller. */
std::vector<int32_t> moves(input &in, const xq_store &s, bool may_seal, bool small) {
    const int32_t bytes = XQ_SLOT_BYTES + 1 - s.n_bytes; // the last byte slot
    std::vector<int32_t> out;
    for (int n = in.ConsumeIntegralInRange<int>(0, 3); n > 0; --n) {
        out.push_back(number(in, {0, 0, s.n_streams - 1}));
        out.push_back(number(in, {0, s.n_pages - 1, s.n_pages - 1}));
        out.push_back(
            number(in, {0, s.n_slots + s.n_staged - 1, may_seal ? XQ_SLOT_SEALED : 0, small ? XQ_SLOT_BYTES : 0, 0}));
        out.push_back(number(in, {XQ_SLOT_NONE, s.n_slots, s.n_slots + s.n_staged - 1}));
        for (int i = 0; i < 4; ++i) {
            out.push_back(in.ConsumeIntegral<int32_t>());
        }
        out.push_back(number(in, {XQ_SLOT_SEALED, XQ_SLOT_SEALED, XQ_SLOT_BYTES, bytes}));
    }
    return out;
}

void update(input &in, const xq_store &s) {
    const auto seals = moves(in, s, false, true), unseals = moves(in, s, false, false);
    std::vector<int32_t> rows;
    for (int n = in.ConsumeIntegralInRange<int>(0, 3); n > 0; --n) {
        rows.push_back(number(in, {0, 5, (s.n_streams * s.n_slots + s.n_staged) * XQ_PAGE - 1}));
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
    const auto pages = moves(in, s, true, true);
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
        out.push_back(number(in, {XQ_SLOT_SEALED, XQ_SLOT_SEALED, XQ_SLOT_NONE, 0, s.n_slots + s.n_staged - 1,
                                  XQ_SLOT_BYTES, XQ_SLOT_BYTES + 1 - s.n_bytes}));
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
        check(n == 0, "counters are 0 again");
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
    // the widest seldom: a map of it takes a thousand times as long
    const auto width = [&] { return number(in, {16, 64, 96, 80, 16, 64, 16, 512}); };
    const int32_t d = width(), e = width();
    const xq_shape shape = {d,
                            e,
                            number(in, {1, 2, 2, 1}),
                            number(in, {1, 3, 3}),
                            number(in, {1, 2, 2}),
                            number(in, {1, 1, 2}),
                            number(in, {0, 1, 2, 2}),
                            number(in, {0, 0, 1})};
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
    check(after[0] == after[1], "all kernel sets store the same");
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    input in(data, size);
    verbs(in);
    return 0;
}
