/* page_table.cpp: see page_table.h for the rules. */
#include "page_table.h"

#include <algorithm>
#include <set>

namespace xq {

void page_table::clear() {
    streams_.assign(shape_.n_streams, {});
    for (stream &st : streams_) {
        st.pages.resize(shape_.n_pages());
        for (int32_t slot = shape_.n_slots - 1; slot >= 0; --slot) {
            st.free_slots.push_back(slot); // the lowest is taken first
        }
    }
}

/* ---- cells for new tokens ---- */

/* One call of find_cells(). */
class page_table::search {
  public:
    search(const page_table &table, const cell_view &cells, int32_t stream, uint32_t head)
        : table(table), cells(cells), stream(stream),
          first((int32_t)(std::min<uint32_t>(head, table.shape_.n_cells - 1) / XQ_PAGE)), taken(table.shape_.n_pages()),
          writer(table.shape_.n_pages(), nobody),
          left(table.seals() ? std::max(table.shape_.n_slots - table.shape_.reserved, 1) : table.shape_.n_pages()) {}

    /* Appends n cells for a sequence; false: there are too few. */
    bool find(int32_t sequence, size_t n, std::vector<uint32_t> &out) {
        const size_t wanted = out.size() + n;
        for (const auto kind : {own_open, empty, any_open, any}) {
            for (int32_t i = 0; i < table.shape_.n_pages() && out.size() < wanted; ++i) {
                const int32_t page = (first + i) % table.shape_.n_pages();
                if (!is_full(page) && is(kind, page, sequence)) {
                    take(page, sequence, wanted, out);
                }
            }
        }
        return out.size() == wanted;
    }

  private:
    enum kind { own_open, empty, any_open, any };
    static constexpr int32_t nobody = -1, several = -2;

    bool is_full(int32_t page) const { return taken[page] == ~0u; }
    bool is_touched(int32_t page) const { return writer[page] != nobody; }
    /* Cells of a page that is neither open nor sealed: an earlier micro-batch of the same batch will open it. */
    bool is_open(int32_t page) const {
        const int32_t state = table.state(stream, page);
        return state >= 0 || (state == XQ_SLOT_NONE && cells.is_any_used(stream, page));
    }

    bool is(kind wanted, int32_t page, int32_t sequence) const {
        switch (wanted) {
        case own_open: // open before, or for this sequence's last cells
            if (is_touched(page) ? writer[page] != sequence : !is_open(page)) {
                return false;
            }
            return cells.is_any_used(stream, page) ? cells.is_own(stream, page, sequence) : is_touched(page);
        case empty:
            return !is_touched(page) && !cells.is_any_used(stream, page);
        case any_open:
            return is_touched(page) || is_open(page);
        default:
            return true;
        }
    }

    /* The page's free cells, up to `wanted` in all. */
    void take(int32_t page, int32_t sequence, size_t wanted, std::vector<uint32_t> &out) {
        if (!is_touched(page) && left == 0) {
            return;
        }
        const int32_t begin = page * XQ_PAGE, end = std::min(begin + XQ_PAGE, table.shape_.n_cells);
        // the first cell of this page that the search has not gone past
        int32_t cell = begin + (int32_t)taken[page];
        const size_t before = out.size();
        for (; cell < end && out.size() < wanted; ++cell) {
            if (!cells.is_used(stream, cell)) {
                out.push_back((uint32_t)cell);
            }
        }
        taken[page] = cell == end ? ~0u : (uint32_t)(cell - begin);
        if (out.size() > before) {
            left -= !is_touched(page);
            writer[page] = !is_touched(page) || writer[page] == sequence ? sequence : several;
        }
    }

    const page_table &table;
    const cell_view &cells;
    int32_t stream, first;
    std::vector<uint32_t> taken; /* [page]: cells that the search went past; ~0: all */
    std::vector<int32_t> writer; /* [page]: the sequence that writes into it */
    int32_t left;                /* pages that may be touched besides */
};

std::vector<uint32_t> page_table::find_cells(const cell_view &cells, int32_t stream,
                                             const std::vector<int32_t> &sequences, uint32_t head) const {
    search at(*this, cells, stream, head);
    std::vector<uint32_t> out(sequences.size());
    for (const int32_t sequence : std::set<int32_t>(sequences.begin(), sequences.end())) {
        std::vector<uint32_t> found;
        const auto n = (size_t)std::count(sequences.begin(), sequences.end(), sequence);
        if (!at.find(sequence, n, found)) {
            return {};
        }
        for (size_t i = 0, next = 0; i < sequences.size(); ++i) {
            if (sequences[i] == sequence) {
                out[i] = found[next++];
            }
        }
    }
    return out;
}

/* ---- what must happen before cells are written ---- */

page_plan page_table::plan(const cell_view &cells, const std::vector<page_write> &writes, bool ages) const {
    page_plan out;
    for (const page_write &write : writes) {
        if (!plan_stream(cells, write, ages, out)) {
            page_plan none;
            none.fits = false;
            return none;
        }
    }
    return out;
}

/* Whether a page has cells besides those that are about to be written. */
static bool has_others(const cell_view &cells, const page_write &write, int32_t page) {
    page_content content = cells.content(write.stream, page);
    for (const uint32_t cell : write.cells) {
        if ((int32_t)(cell / XQ_PAGE) == page) {
            content.valid[cell % XQ_PAGE / 32] &= ~(1u << (cell % 32));
        }
    }
    return std::any_of(std::begin(content.valid), std::end(content.valid), [](uint32_t word) { return word != 0; });
}

bool page_table::plan_stream(const cell_view &cells, const page_write &write, bool ages, page_plan &out) const {
    const stream &st = streams_[write.stream];
    std::set<int32_t> written;
    for (const uint32_t cell : write.cells) {
        written.insert((int32_t)(cell / XQ_PAGE));
    }

    /* An open page that could be sealed to make room: the unpinned before the pinned, of these the first of a sequence
     * last; then the one that was written longest ago. */
    struct candidate {
        int32_t page, rank;
        page_content content;
    };
    std::vector<candidate> candidates;
    std::vector<int32_t> slots = st.free_slots;
    const auto seal = [&](int32_t page, const page_content &content) {
        page_move move = {write.stream, page, st.pages[page].state, {}};
        std::copy(std::begin(content.valid), std::end(content.valid), move.valid);
        out.seals.push_back(move);
        slots.push_back(move.slot);
    };
    for (int32_t p = 0; p < shape_.n_pages(); ++p) {
        const int32_t state = st.pages[p].state;
        if (state == XQ_SLOT_NONE || written.count(p) > 0) {
            continue;
        }
        if (!cells.is_any_used(write.stream, p)) {
            out.released.push_back({write.stream, p, state, {}});
            if (state >= 0) {
                slots.push_back(state);
            }
        } else if (state >= 0) {
            const page_content content = cells.content(write.stream, p);
            if (ages && seals() && !is_pinned(content.lowest) &&
                age(cells, write.stream, p) >= (uint64_t)shape_.window) {
                seal(p, content);
            } else {
                candidates.push_back({p, is_pinned(content.lowest) ? content.lowest : INT32_MAX, content});
            }
        }
    }
    const auto is_better = [&](const candidate &a, const candidate &b) {
        return a.rank != b.rank ? a.rank > b.rank : st.pages[a.page].written < st.pages[b.page].written;
    };

    for (const int32_t p : written) {
        const int32_t state = st.pages[p].state;
        if (state >= 0) {
            continue;
        }
        if (slots.empty()) {
            const auto victim = std::min_element(candidates.begin(), candidates.end(), is_better);
            if (victim == candidates.end()) {
                return false;
            }
            seal(victim->page, victim->content);
            candidates.erase(victim);
        }
        const page_move move = {write.stream, p, slots.back(), {}};
        slots.pop_back();
        (state == XQ_SLOT_SEALED && has_others(cells, write, p) ? out.unseals : out.opens).push_back(move);
    }
    return true;
}

void page_table::commit_seals(const page_plan &plan) {
    const auto give_back = [&](const page_move &move, int32_t state) {
        stream &st = streams_[move.stream];
        page &pg = st.pages[move.page];
        if (pg.state >= 0) {
            st.free_slots.push_back(pg.state);
        }
        pg.state = state;
    };
    for (const page_move &move : plan.released) {
        give_back(move, XQ_SLOT_NONE);
    }
    for (const page_move &move : plan.seals) {
        give_back(move, XQ_SLOT_SEALED);
    }
}

void page_table::commit_opens(const page_plan &plan) {
    for (const auto *moves : {&plan.unseals, &plan.opens}) {
        for (const page_move &move : *moves) {
            stream &st = streams_[move.stream];
            st.free_slots.erase(std::find(st.free_slots.begin(), st.free_slots.end(), move.slot));
            st.pages[move.page].state = move.slot;
        }
    }
}

/* ---- clocks ---- */

uint64_t page_table::age(const cell_view &cells, int32_t stream, int32_t page) const {
    const struct stream &st = streams_[stream];
    const auto &pg = st.pages[page];
    if ((size_t)pg.sequence < st.clocks.size() && cells.is_own(stream, page, pg.sequence)) {
        return st.clocks[pg.sequence] - pg.own;
    }
    return st.clock - pg.written;
}

void page_table::wrote(const cell_view &cells, const page_write &write) {
    stream &st = streams_[write.stream];
    for (const uint32_t cell : write.cells) {
        const int32_t sequence = cells.owner(write.stream, (int32_t)cell);
        page &pg = st.pages[cell / XQ_PAGE];
        pg = {pg.state, sequence, ++st.clock, ++st.clock_of(sequence)};
    }
}

void page_table::place(int32_t stream, int32_t page, bool sealed, int32_t sequence, uint64_t age) {
    struct stream &st = streams_[stream];
    auto &pg = st.pages[page];
    if (sealed && pg.state >= 0) {
        st.free_slots.push_back(pg.state);
    }
    // clocks wrap where the page is older than they are, and age() wraps back
    pg = {sealed ? XQ_SLOT_SEALED : pg.state, sequence, st.clock - age, st.clock_of(sequence) - age};
}

void page_table::grow(int32_t n_slots, int32_t reserved) {
    for (stream &st : streams_) {
        for (int32_t slot = shape_.n_slots; slot < n_slots; ++slot) {
            st.free_slots.insert(st.free_slots.begin(), slot); // the lowest is taken first
        }
    }
    shape_.n_slots = n_slots;
    shape_.reserved = reserved;
}

} // namespace xq
