/* state.cpp: fuzz target: saved states, of whole caches and of sequences.
 *
 * An input is three bytes, and a state: which context it is loaded into (see kinds), as which sequence (2: as a whole
 * cache), and what is done next.  A state that is refused leaves the live one as it was; whatever happens, the context
 * still decodes, shifts, copies, saves and loads.
 */
#include "fuzz.h"

#include "xquant-hash.h"

#include <algorithm>
#include <fstream>
#include <memory>

namespace {

constexpr uint32_t n_seq = 2;

struct live {
    fuzz::context context;
    std::vector<uint8_t> start;
    std::vector<std::vector<uint8_t>> sequences;

    live(llama_model *model, const fuzz::shape &shape) : context(model, shape) {
        fuzz::check(context.ctx != nullptr, "the context is made");
        fuzz::check(context.decode(0, 0, 300) == 0 && context.decode(1, 0, 40) == 0, "the context decodes");
        // few cells of many pages: a mutation then mostly meets what describes them
        llama_memory_t memory = llama_get_memory(context.ctx);
        for (llama_pos p = 0; p < 300; p += 50) {
            llama_memory_seq_rm(memory, 0, p, p + 48);
        }
        llama_memory_seq_rm(memory, 1, 0, 37);
        start = context.save();
        reset();
        sequences = save_all();
    }

    void reset() {
        fuzz::check(llama_state_set_data(context.ctx, start.data(), start.size()) == start.size(), "the start loads");
    }

    /* The states of all sequences: the cells of sliding layers may have changed places. */
    std::vector<std::vector<uint8_t>> save_all() {
        std::vector<std::vector<uint8_t>> states;
        for (uint32_t s = 0; s < n_seq; ++s) {
            states.push_back(context.save((llama_seq_id)s));
        }
        return states;
    }
};

/* The contexts: one stream, one stream a sequence, sliding layers, borrowed codes and a map, never sealing, pages in
 * bytes. */
std::vector<std::unique_ptr<live>> make_kinds() {
    const std::vector<std::pair<std::string, std::string>> sealing = {{"xquant.window", "0"}, {"xquant.pinned", "0"}};
    llama_model *plain = fuzz::load_model("plain", sealing);
    std::vector<std::unique_ptr<live>> kinds;
    kinds.push_back(std::make_unique<live>(plain, fuzz::shape{1024, n_seq, true}));
    kinds.push_back(std::make_unique<live>(plain, fuzz::shape{2048, n_seq, false}));
    kinds.push_back(std::make_unique<live>(fuzz::load_model("sliding", sealing), fuzz::shape{1024, n_seq, true}));
    kinds.push_back(std::make_unique<live>(fuzz::load_model("mixed"), fuzz::shape{1024, n_seq, true}));
    kinds.push_back(
        std::make_unique<live>(fuzz::load_model("plain", {{"xquant.window", "-1"}}), fuzz::shape{1024, n_seq, true}));
    kinds.push_back(
        std::make_unique<live>(fuzz::load_model("plain", {{"xquant.pinned", "2"}}), fuzz::shape{1024, n_seq, true}));
    return kinds;
}

/* A state whose checksum fits, which a mutation would never find. */
std::vector<uint8_t> with_checksum(const uint8_t *data, size_t size) {
    static const char magic[] = "XQS3";
    std::vector<uint8_t> state(data, data + size);
    const auto start = std::search(state.begin(), state.end(), magic, magic + 4);
    if (state.end() - start >= 4 + 8) {
        xquant::hasher hash;
        hash.add(&*start, (size_t)(state.end() - start) - 8);
        const uint64_t checksum = hash.value();
        std::copy_n((const uint8_t *)&checksum, 8, state.end() - 8);
    }
    return state;
}

/* What an application may do next; then one more token of every sequence. */
void go_on(fuzz::context &context, int what) {
    llama_memory_t memory = llama_get_memory(context.ctx);
    if (what & 1) {
        llama_memory_seq_rm(memory, 0, 20, 150);
    }
    if (what & 2) {
        llama_memory_seq_add(memory, 0, 0, -1, 5);
    }
    if (what & 4) {
        llama_memory_seq_cp(memory, 0, 1, -1, -1);
    }
    if (what & 8) {
        llama_memory_seq_div(memory, 1, 0, -1, 2);
    }
    if (what & 16) {
        llama_memory_seq_keep(memory, 1);
    }
    for (uint32_t s = 0; s < n_seq; ++s) {
        const llama_pos end = llama_memory_seq_pos_max(memory, (llama_seq_id)s);
        const int code = context.decode((llama_seq_id)s, end + 1, 1 + (what & 32 ? 40 : 0));
        // 1: full
        fuzz::check(code == 0 || code == 1, "the context decodes");
    }
}

} // namespace

/* With XQUANT_FUZZ_SEEDS=folder the seeds are written there. */
extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    fuzz::quiet();
    const char *folder = getenv("XQUANT_FUZZ_SEEDS");
    if (!folder) {
        return 0;
    }
    const auto kinds = make_kinds();
    for (size_t kind = 0; kind < kinds.size(); ++kind) {
        for (uint32_t s = 0; s <= n_seq; ++s) {
            std::vector<uint8_t> state = s == n_seq ? kinds[kind]->start : kinds[kind]->context.save(s);
            state.insert(state.begin(), {(uint8_t)kind, (uint8_t)s, (uint8_t)(kind * 8 + s)});
            std::ofstream((std::string(folder) + "/" + std::to_string(kind) + "-" + std::to_string(s)).c_str())
                .write((const char *)state.data(), (std::streamsize)state.size());
        }
    }
    exit(0);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const auto kinds = make_kinds();
    if (size < 3) {
        return 0;
    }
    live &to = *kinds[data[0] % kinds.size()];
    const llama_seq_id sequence = data[1] % (n_seq + 1);
    const int next = data[2];
    const std::vector<uint8_t> state = with_checksum(data + 3, size - 3);
    data = state.data();
    size -= 3;

    llama_context *ctx = to.context.ctx;
    const size_t n =
        sequence == n_seq ? llama_state_set_data(ctx, data, size) : llama_state_seq_set_data(ctx, data, size, sequence);
    fuzz::check(n <= size, "no more is read than there is");
    if (n == 0) {
        fuzz::check(to.save_all() == to.sequences, "a state that is refused changes nothing");
    } else {
        const auto now = to.context.save();
        fuzz::check(llama_state_set_data(ctx, now.data(), now.size()) == now.size(), "what was taken can be saved");
        fuzz::check(to.context.save() == now, "and loaded");
    }
    go_on(to.context, next);
    to.reset();
    return 0;
}
