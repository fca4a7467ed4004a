/* plan_pages.cpp: what must move before and after cells are written; page_table.h has the rule of sealing. */
#include "page_table.h"

#include <algorithm>
#include <set>

namespace xq {

page_plan page_table::plan(const cell_view &cells, const std::vector<page_write> &writes, bool in_graph) const {
    page_plan out;
    for (const page_write &write : writes) {
        if (!plan_stream(cells, write, in_graph, out)) {
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

/* One stream's share of a plan. */
class page_table::planner {
  public:
    planner(const page_table &table, const cell_view &cells, const page_write &write, bool in_graph, page_plan &out)
        : table(table), cells(cells), write(write), in_graph(in_graph), out(out), st(table.streams_[write.stream]),
          slots(st.free_slots) {
        for (const uint32_t cell : write.cells) {
            written.insert((int32_t)(cell / XQ_PAGE));
        }
    }

    /* Pages that are not written: free ones give their slots back, what left the window is sealed. */
    void look_around() {
        for (int32_t p = 0; p < table.shape_.n_pages(); ++p) {
            const int32_t state = st.pages[p].state;
            if (state == XQ_SLOT_NONE || written.count(p) > 0) {
                continue;
            }
            if (!cells.is_any_used(write.stream, p)) {
                out.released.push_back(move_of(p, state));
                if (state >= 0) {
                    slots.push_back(state);
                }
            } else if (state >= 0) {
                const candidate c = candidate_of(p, state, st);
                if (in_graph && leaves(c, st)) {
                    seal(c);
                } else {
                    open.push_back(c);
                }
            }
        }
    }

    /* Written pages get slots, of the stream or of the stage; false: there are too few. */
    bool open_written() {
        std::vector<int32_t> fresh;
        for (const int32_t p : written) {
            const int32_t state = st.pages[p].state;
            if (state >= 0) {
                kept.push_back({p, state});
            } else if (!has_others(cells, write, p)) {
                fresh.push_back(p);
            } else if (!take_slot()) {
                return false;
            } else {
                (state == XQ_SLOT_SEALED ? out.unseals : out.opens).push_back(move_of(p, slots.back()));
                kept.push_back({p, slots.back()});
                slots.pop_back();
            }
        }
        return open_fresh(fresh);
    }

  private:
    /* An open page; what is sealed to make room: the unpinned before the pinned, of these the first of a sequence last;
     * then the one that was written longest ago. */
    struct candidate {
        int32_t page, slot, rank;
        uint64_t newest;
        page_content content;

        bool operator<(const candidate &b) const { return rank != b.rank ? rank > b.rank : newest < b.newest; }
    };
    struct kept_page {
        int32_t page, slot;
    };

    page_move move_of(int32_t page, int32_t slot) const { return {write.stream, page, slot, XQ_SLOT_NONE, {}}; }
    candidate candidate_of(int32_t page, int32_t slot, const stream &clocks) const {
        const page_content content = cells.content(write.stream, page);
        return {page, slot, table.is_pinned(content.lowest) ? content.lowest : INT32_MAX, clocks.pages[page].written,
                content};
    }
    bool leaves(const candidate &c, const stream &clocks) const {
        return table.seals() && c.rank == INT32_MAX &&
               age_in(clocks, cells, write.stream, c.page) >= (uint64_t)table.shape_.window;
    }
    /* Likewise, by the end of this micro-batch: without a window, the page that the next one goes on with stays. */
    bool leaves_then(const candidate &c, const stream &later) const {
        const bool is_full = std::all_of(std::begin(c.content.valid), std::end(c.content.valid),
                                         [](uint32_t word) { return word == ~0u; });
        return leaves(c, later) && (is_full || age_in(later, cells, write.stream, c.page) > 0);
    }
    static page_move sealing(page_move move, const candidate &c) {
        std::copy(std::begin(c.content.valid), std::end(c.content.valid), move.valid);
        return move;
    }
    void seal(const candidate &c) {
        out.seals.push_back(sealing(move_of(c.page, c.slot), c));
        slots.push_back(c.slot);
    }
    /* A free slot at the end of `slots`, if need be of a page that is sealed for it. */
    bool take_slot() {
        if (slots.empty()) {
            const auto victim = std::min_element(open.begin(), open.end());
            if (victim == open.end()) {
                return false;
            }
            seal(*victim);
            open.erase(victim);
        }
        return true;
    }

    /* Pages without other cells: slots that are free for those that stay open, the stage for the rest. */
    bool open_fresh(const std::vector<int32_t> &fresh) {
        if (!in_graph || write.cells.size() == 1) { // nothing would be gained by waiting
            return std::all_of(fresh.begin(), fresh.end(), [this](int32_t p) { return open_at_once(p); });
        }
        stream later = st;
        advance(later, cells, write);
        int32_t n_staged = 0;
        std::vector<candidate> pages; // that will be open, if there are enough slots
        for (const candidate &c : open) {
            pages.push_back(c);
        }
        for (const kept_page &k : kept) {
            pages.push_back(candidate_of(k.page, k.slot, later));
        }
        for (const int32_t p : fresh) {
            candidate c = candidate_of(p, XQ_SLOT_NONE, later);
            if (!slots.empty() && !leaves_then(c, later)) {
                c.slot = slots.back();
                slots.pop_back();
                out.opens.push_back(move_of(p, c.slot));
            } else {
                c.slot = table.shape_.n_slots + out.n_staged++;
                out.opens.push_back(move_of(p, c.slot));
                if (++n_staged > table.shape_.staged) {
                    return false;
                }
            }
            pages.push_back(c);
        }
        if (n_staged > 0) {
            clear_stage(std::move(pages), later);
        }
        return true;
    }

    bool open_at_once(int32_t page) {
        if (!take_slot()) {
            return false;
        }
        out.opens.push_back(move_of(page, slots.back()));
        slots.pop_back();
        return true;
    }

    /* What is sealed once all is written, so that the others have slots. */
    void clear_stage(std::vector<candidate> pages, const stream &later) {
        const auto stays = std::stable_partition(pages.begin(), pages.end(),
                                                 [&](const candidate &c) { return leaves_then(c, later); });
        std::sort(stays, pages.end());
        const auto n_slots = (std::ptrdiff_t)(table.shape_.n_slots - (int32_t)slots.size());
        const auto first = pages.end() - std::min<std::ptrdiff_t>(pages.end() - stays, n_slots); // that stays
        std::vector<page_move *> emptied;
        const size_t before = out.after.size();
        for (auto c = pages.begin(); c != first; ++c) {
            out.after.push_back(sealing(move_of(c->page, c->slot), *c));
        }
        for (size_t i = before; i < out.after.size(); ++i) {
            if (!table.is_staged(out.after[i].slot)) {
                emptied.push_back(&out.after[i]);
            }
        }
        for (auto c = first; c != pages.end(); ++c) {
            if (table.is_staged(c->slot)) {
                emptied.back()->refill = c->slot;
                emptied.pop_back();
            }
        }
    }

    const page_table &table;
    const cell_view &cells;
    const page_write &write;
    bool in_graph;
    page_plan &out;
    const stream &st;
    std::set<int32_t> written;
    std::vector<int32_t> slots;  /* that are free */
    std::vector<candidate> open; /* pages that are open and not written */
    std::vector<kept_page> kept; /* written pages that have slots of the stream */
};

bool page_table::plan_stream(const cell_view &cells, const page_write &write, bool in_graph, page_plan &out) const {
    planner of(*this, cells, write, in_graph, out);
    of.look_around();
    return of.open_written();
}

} // namespace xq
