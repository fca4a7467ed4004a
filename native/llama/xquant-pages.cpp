/* xquant-pages.cpp: which pages are free, open or sealed, and what may be done to sequences; see xquant-cache.h for the
 * rule.
 */
#include "xquant-cache.h"

#include "llama-impl.h"

#include <algorithm>
#include <set>

namespace xquant {

void cache::clear() {
    for (auto &st : streams) {
        st.pages.assign(n_pages, {});
        st.free_slots.resize(n_slots);
        for (int32_t i = 0; i < n_slots; ++i) {
            st.free_slots[i] = n_slots - 1 - i; // the lowest slot is taken first
        }
        st.clock = 0;
    }
    pending_seals.clear();
    pending_unseals.clear();
    extra_filled = false; // llama.cpp may set all bytes to 0
    for (auto &l : layers_) {
        l->done = epoch;
    }
}

void cache::valid_cells(uint32_t s, int32_t p, uint32_t valid[4]) const {
    const auto &c = cells(s);
    const uint32_t first = (uint32_t)p * XQ_PAGE, end = std::min(first + XQ_PAGE, c.size());
    std::fill(valid, valid + 4, 0u);
    for (uint32_t i = first; i < end; ++i) {
        if (!c.is_empty(i)) {
            valid[(i - first) / 32] |= 1u << ((i - first) % 32);
        }
    }
}

bool cache::has_cells(uint32_t s, int32_t p) const {
    const auto &c = cells(s);
    const uint32_t first = (uint32_t)p * XQ_PAGE, end = std::min(first + XQ_PAGE, c.size());
    uint32_t i = first;
    while (i < end && c.is_empty(i)) {
        i++;
    }
    return i < end;
}

/* The lowest position in page p of stream s; beyond all of them if it has no cells. */
llama_pos cache::first_position(uint32_t s, int32_t p) const {
    const auto &c = cells(s);
    const uint32_t first = (uint32_t)p * XQ_PAGE, end = std::min(first + XQ_PAGE, c.size());
    llama_pos lowest = INT32_MAX;
    for (uint32_t i = first; i < end; ++i) {
        if (!c.is_empty(i)) {
            lowest = std::min(lowest, c.pos_get(i));
        }
    }
    return lowest;
}

void cache::release_pages() {
    for (uint32_t s = 0; s < n_streams; ++s) {
        for (int32_t p = 0; p < n_pages; ++p) {
            page &pg = streams[s].pages[p];
            if (pg.state == page_free || has_cells(s, p)) {
                continue;
            }
            if (pg.state >= 0) {
                streams[s].free_slots.push_back(pg.state);
            }
            pg = {};
        }
    }
}

/* At most n free cells of stream s from its head on, in no more pages than a micro-batch may write. */
std::vector<uint32_t> cache::find_cells(uint32_t s, uint32_t n, bool in_sealed) const {
    const auto &c = cells(s);
    // as llama.cpp does: with enough free cells before the head, the search starts anew
    const uint32_t head = kv.v_heads[s] > c.get_used() + 2 * n ? 0 : kv.v_heads[s];
    int32_t left = seals ? n_slots - pages_of(window) : n_pages, last = -1;
    std::vector<uint32_t> found;
    for (uint32_t i = 0; i < c.size() && found.size() < n; ++i) {
        const uint32_t cell = (head + i) % c.size();
        const auto p = (int32_t)(cell / XQ_PAGE);
        if (!c.is_empty(cell) || (!in_sealed && streams[s].pages[p].state == page_sealed)) {
            continue;
        }
        if (p != last && left-- == 0) {
            break;
        }
        last = p;
        found.push_back(cell);
    }
    return found;
}

cache::slot_info cache::find_slot(const llama_ubatch &ubatch) const {
    const uint32_t n_seqs = n_streams > 1 ? ubatch.n_seqs_unq : 1, n_tokens = ubatch.n_tokens / n_seqs;
    slot_info out = {LLAMA_MAX_SEQ, 0, {}, {}};
    out.resize(n_seqs);
    for (uint32_t i = 0; i < n_seqs; ++i) {
        const uint32_t s = kv.seq_to_stream[ubatch.seq_id_unq[i]];
        out.s0 = std::min(out.s0, s);
        out.s1 = std::max(out.s1, s);
        out.strm[i] = (llama_seq_id)s;
        out.idxs[i] = find_cells(s, n_tokens, false);
        if (out.idxs[i].size() < n_tokens) {
            out.idxs[i] = find_cells(s, n_tokens, true);
        }
        if (out.idxs[i].size() < n_tokens) {
            return {};
        }
    }
    return out;
}

/* Marks page p of stream s sealed and frees its slot; the graph does the work. */
void cache::seal(uint32_t s, int32_t p) {
    page &pg = streams[s].pages[p];
    seal_op op = {(int32_t)s, p, pg.state, {}};
    valid_cells(s, p, op.valid);
    pending_seals.push_back(op);
    streams[s].free_slots.push_back(pg.state);
    pg.state = page_sealed;
}

/* A free slot; if there is none, the page outside `keep` that was written longest ago is sealed.  Pinned ones are last,
 * and of these the one that starts a sequence: there may be more of them than slots, once positions were shifted. */
int32_t cache::take_slot(uint32_t s, const std::vector<int32_t> &keep) {
    stream &st = streams[s];
    if (st.free_slots.empty()) {
        int32_t victim = -1;
        llama_pos victim_first = 0; // of a pinned page; else beyond all of them
        for (int32_t p = 0; p < n_pages; ++p) {
            if (st.pages[p].state < 0 || std::find(keep.begin(), keep.end(), p) != keep.end()) {
                continue;
            }
            const llama_pos lowest = first_position(s, p), first = pins(lowest) ? lowest : INT32_MAX;
            if (victim < 0 || first > victim_first || (first == victim_first && st.age(p) > st.age(victim))) {
                victim = p;
                victim_first = first;
            }
        }
        if (victim < 0) {
            return -1;
        }
        seal(s, victim);
    }
    const int32_t slot = st.free_slots.back();
    st.free_slots.pop_back();
    return slot;
}

/* Gives page p a slot, if it has none, because some of its cells are about to be written. */
bool cache::open(uint32_t s, int32_t p, const std::vector<int32_t> &keep) {
    page &pg = streams[s].pages[p];
    if (pg.state >= 0) {
        return true;
    }
    const int32_t slot = take_slot(s, keep);
    if (slot < 0) {
        return false;
    }
    if (pg.state == page_sealed) {
        pending_unseals.push_back({(int32_t)s, p, slot});
    }
    pg.state = slot;
    return true;
}

bool cache::begin(const slot_info &sinfo) {
    finish_interrupted();
    pending_seals.clear();
    pending_unseals.clear();
    epoch++;
    if (!extra_filled) {
        fill_extra();
    }
    // reading a device's counters waits for it: only now and then
    if (!warned && (n_nonfinite.load() > 0 || (epoch % 256 == 0 && count_nonfinite() > 0))) {
        warned = true;
        LLAMA_LOG_WARN(
            "%s: xquant: keys or values that are not finite were stored as 0 or +-65504; with this model, use "
            "the cache type f32 or bf16\n",
            __func__);
    }

    for (uint32_t i = 0; i < sinfo.n_stream(); ++i) {
        const uint32_t s = (uint32_t)sinfo.strm[i];
        stream &st = streams[s];
        std::set<int32_t> written;
        for (const uint32_t cell : sinfo.idxs[i]) {
            written.insert((int32_t)(cell / XQ_PAGE));
        }
        const std::vector<int32_t> touched(written.begin(), written.end());

        for (int32_t p = 0; p < n_pages; ++p) {
            if (st.pages[p].state < 0 || std::binary_search(touched.begin(), touched.end(), p)) {
                continue;
            }
            if (seals && st.age(p) >= window && !pins(first_position(s, p))) {
                seal(s, p);
            }
        }
        for (const int32_t p : touched) {
            if (!open(s, p, touched)) {
                LLAMA_LOG_ERROR("%s: xquant: a micro-batch writes %zu pages, %d fit\n", __func__, touched.size(),
                                n_slots);
                return false;
            }
        }
        for (const uint32_t cell : sinfo.idxs[i]) {
            st.pages[cell / XQ_PAGE].written = ++st.clock;
        }
    }
    return true;
}

void cache::copy_stream(uint32_t from, uint32_t to) {
    finish_interrupted();
    if (sched) {
        ggml_backend_sched_synchronize(sched);
    }
    streams[to] = streams[from];
    for (const auto &l : layers_) {
        ggml_backend_tensor_copy(l->blocks_stream[from], l->blocks_stream[to]);
        ggml_backend_tensor_copy(l->window_stream[from], l->window_stream[to]);
    }
}

bool cache::has_sequence(llama_seq_id id, const char *caller) const {
    if (id < 0 || (uint32_t)id >= kv.n_seq_max) {
        LLAMA_LOG_ERROR("%s: xquant: sequence is %d, must be 0 to %u\n", caller, id, kv.n_seq_max - 1);
        return false;
    }
    return true;
}

bool cache::may_add(llama_seq_id id, llama_pos shift) const {
    if (!has_sequence(id, "seq_add")) {
        return false;
    }
    const int64_t newest = cells(kv.seq_to_stream[id]).seq_pos_max(id);
    if (newest + shift > max_position || (int64_t)shift < -max_position) {
        LLAMA_LOG_ERROR("seq_add: xquant: shift is %d for positions up to %d, must be at least %d, and end at %d\n",
                        shift, (int)newest, -max_position, max_position);
        return false;
    }
    return true;
}

bool cache::may_divide(llama_seq_id id, int divisor) const {
    if (divisor < 1) {
        LLAMA_LOG_ERROR("seq_div: xquant: divisor is %d, must be at least 1\n", divisor);
        return false;
    }
    return has_sequence(id, "seq_div");
}

} // namespace xquant
