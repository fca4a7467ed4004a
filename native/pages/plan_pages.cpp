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
          slots(st.free_slots), bytes(st.free_bytes) {
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
                release(p, state);
            } else if (xq::is_open(state)) {
                const candidate c = candidate_of(p, state, st);
                if (in_graph && leaves(c, st)) {
                    seal(c);
                } else {
                    (is_bytes(state) ? small : open).push_back(c);
                }
            }
        }
    }

    /* Written pages get slots, of the stream or of the stage; false: there are too few. */
    bool open_written() {
        std::vector<int32_t> fresh, closed;
        for (const int32_t p : written) {
            const int32_t state = st.pages[p].state;
            if (!has_others(cells, write, p)) {
                fresh.push_back(p);
                release(p, state); // the slot of what was there may be all that another written page can get
            } else if (state >= 0) {
                kept.push_back({p, state});
            } else {
                closed.push_back(p);
            }
        }
        for (const int32_t p : closed) {
            if (!take_slot()) {
                return false;
            }
            page_move move = move_of(p, slots.back());
            move.small = st.pages[p].state;
            (move.small == XQ_SLOT_NONE ? out.opens : out.unseals).push_back(move);
            kept.push_back({p, slots.back()});
            slots.pop_back();
        }
        return open_fresh(fresh);
    }

  private:
    /* An open page; what is sealed to make room: the unpinned before the pinned, of these the first of a sequence last;
     * then the one that was written longest ago.  What is never sealed comes last. */
    struct candidate {
        int32_t page, slot, rank;
        uint64_t newest;
        page_content content;

        bool operator<(const candidate &b) const { return rank != b.rank ? rank > b.rank : newest < b.newest; }
        bool is_full() const {
            return std::all_of(std::begin(content.valid), std::end(content.valid), [](uint32_t w) { return w == ~0u; });
        }
    };
    struct kept_page {
        int32_t page, slot;
    };
    /* Which needs rows least: a full page, which is not written again soon; of these a pinned one, since the others are
     * sealed one day, from rows with more precision than from bytes. */
    static bool needs_less(const candidate &a, const candidate &b) {
        const bool full = a.is_full(), pinned = a.rank != INT32_MAX;
        if (full != b.is_full()) {
            return full;
        }
        return full && pinned != (b.rank != INT32_MAX) ? pinned : a.newest < b.newest;
    }

    page_move move_of(int32_t page, int32_t slot) const {
        return {write.stream, page, slot, XQ_SLOT_NONE, {}, XQ_SLOT_SEALED};
    }
    candidate candidate_of(int32_t page, int32_t slot, const stream &clocks) const {
        const page_content content = cells.content(write.stream, page);
        const int32_t rank = !table.can_seal(page)             ? INT32_MIN
                             : table.is_pinned(content.lowest) ? content.lowest
                                                               : INT32_MAX;
        return {page, slot, rank, clocks.pages[page].written, content};
    }
    bool leaves(const candidate &c, const stream &clocks) const {
        return c.rank == INT32_MAX && age_in(clocks, cells, write.stream, c.page) >= (uint64_t)table.shape_.window;
    }
    /* Likewise, by the end of this micro-batch: without a window, the page that the next one goes on with stays. */
    bool leaves_then(const candidate &c, const stream &later) const {
        return leaves(c, later) && (c.is_full() || age_in(later, cells, write.stream, c.page) > 0);
    }
    /* To codes, or to a byte slot. */
    page_move shrinking(const candidate &c, int32_t to) const {
        page_move move = move_of(c.page, c.slot);
        std::copy(std::begin(c.content.valid), std::end(c.content.valid), move.valid);
        move.small = to;
        return move;
    }
    void release(int32_t page, int32_t state) {
        if (state != XQ_SLOT_NONE) {
            out.released.push_back(move_of(page, state));
            give_back(state);
        }
    }
    void give_back(int32_t state) {
        if (state != XQ_SLOT_SEALED) {
            (is_bytes(state) ? bytes : slots).push_back(state);
        }
    }

    /* ---- before the cells are written ---- */

    void seal(const candidate &c) {
        out.seals.push_back(shrinking(c, XQ_SLOT_SEALED));
        give_back(c.slot);
    }
    /* Byte slots that are free when all pages that shall go to one have got one. */
    bool has_bytes_left() const {
        return bytes.size() >
               (size_t)std::count_if(small.begin(), small.end(), [](const auto &c) { return c.slot >= 0; });
    }
    /* A page in rows goes to a byte slot, which it gets in the end (shrink_chosen). */
    void choose_to_shrink(std::vector<candidate>::iterator c) {
        slots.push_back(c->slot);
        small.push_back(*c);
        open.erase(c);
    }
    /* A free slot at the end of `slots`, if need be of a page that goes to a byte slot, or is sealed, for it. */
    bool take_slot() {
        if (!slots.empty()) {
            return true;
        }
        if (open.empty()) {
            return false;
        }
        const auto worst = std::min_element(open.begin(), open.end());
        if (!has_bytes_left()) {
            const auto other = std::min_element(small.begin(), small.end());
            const bool is_worst = other == small.end() || *worst < *other;
            if ((is_worst ? worst : other)->rank == INT32_MIN) {
                return false;
            }
            if (is_worst) {
                seal(*worst);
                open.erase(worst);
                return true;
            }
            out.seals.push_back(shrinking(*other, XQ_SLOT_SEALED));
            if (is_bytes(other->slot)) {
                bytes.push_back(other->slot);
            }
            small.erase(other);
        }
        choose_to_shrink(std::min_element(open.begin(), open.end(), needs_less));
        return true;
    }
    void shrink_chosen() {
        for (candidate &c : small) {
            if (c.slot >= 0) {
                out.shrinks.push_back(shrinking(c, bytes.back()));
                c.slot = bytes.back();
                bytes.pop_back();
            }
        }
        for (const page_move &move : out.unseals) { // whose bytes are rows from now on
            if (move.stream == write.stream && is_bytes(move.small)) {
                bytes.push_back(move.small);
            }
        }
    }

    /* Pages without other cells: slots that are free for those that stay open, the stage for the rest. */
    bool open_fresh(const std::vector<int32_t> &fresh) {
        if (fresh.empty() || !in_graph || write.cells.size() == 1) { // nothing would be gained by waiting
            const bool fits = std::all_of(fresh.begin(), fresh.end(), [this](int32_t p) { return open_at_once(p); });
            shrink_chosen();
            return fits;
        }
        stream later = st;
        advance(later, cells, write);
        int32_t n_staged = 0;
        std::vector<candidate> pages; // written ones, which will be open if there are enough slots
        for (const kept_page &k : kept) {
            pages.push_back(candidate_of(k.page, k.slot, later));
        }
        for (const int32_t p : fresh) {
            candidate c = candidate_of(p, XQ_SLOT_NONE, later);
            if (!leaves_then(c, later) && find_slot(later)) {
                c.slot = slots.back();
                slots.pop_back();
            } else {
                c.slot = table.shape_.n_slots + out.n_staged++;
                if (++n_staged > table.shape_.staged) {
                    return false;
                }
            }
            out.opens.push_back(move_of(p, c.slot));
            pages.push_back(c);
        }
        shrink_chosen();
        pages.insert(pages.end(), open.begin(), open.end());
        pages.insert(pages.end(), small.begin(), small.end());
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

    /* A free slot, if need be of a full page that will stay open, for which there is a byte slot: one that leaves the
     * window is better sealed from rows. */
    bool find_slot(const stream &later) {
        for (auto c = open.begin(); slots.empty() && c != open.end() && has_bytes_left();) {
            if (c->is_full() && !leaves(*c, later)) {
                choose_to_shrink(c);
                break;
            }
            ++c;
        }
        return !slots.empty();
    }

    /* ---- after they are written ---- */

    /* What is sealed, and what becomes bytes, so that the others have slots. */
    void clear_stage(std::vector<candidate> pages, const stream &later) {
        const auto stays = std::stable_partition(pages.begin(), pages.end(),
                                                 [&](const candidate &c) { return leaves_then(c, later); });
        std::sort(stays, pages.end());
        const auto n_slots = (std::ptrdiff_t)(table.shape_.n_slots - (int32_t)slots.size()); // that pages have now
        const auto n_open = std::min<std::ptrdiff_t>(pages.end() - stays, n_slots + table.shape_.n_bytes);
        const auto first = pages.end() - n_open; // that stays open; those in bytes stay there
        const auto rows = std::stable_partition(first, pages.end(), [](const auto &c) { return is_bytes(c.slot); });
        std::sort(rows, pages.end(), needs_less);
        const auto first_slot = pages.end() - std::min(pages.end() - rows, n_slots);
        const size_t before[] = {out.after[0].size(), out.after[1].size()};
        for (auto c = pages.begin(); c != first; ++c) {
            out.after[0].push_back(shrinking(*c, XQ_SLOT_SEALED));
            if (is_bytes(c->slot)) {
                bytes.push_back(c->slot);
            }
        }
        for (auto c = rows; c != first_slot; ++c) {
            out.after[1].push_back(shrinking(*c, bytes.back()));
            bytes.pop_back();
        }
        std::vector<page_move *> emptied;
        for (const int step : {0, 1}) {
            for (size_t i = before[step]; i < out.after[step].size(); ++i) {
                page_move &move = out.after[step][i];
                if (move.slot >= 0 && !table.is_staged(move.slot)) {
                    emptied.push_back(&move);
                }
            }
        }
        for (auto c = first_slot; c != pages.end(); ++c) {
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
    std::vector<int32_t> slots, bytes; /* that are free; bytes: as states */
    std::vector<candidate> open;       /* pages in slots that are not written */
    std::vector<candidate> small;      /* in byte slots, or, while they have a slot, chosen for one */
    std::vector<kept_page> kept;       /* written pages that have slots of the stream */
};

bool page_table::plan_stream(const cell_view &cells, const page_write &write, bool in_graph, page_plan &out) const {
    planner of(*this, cells, write, in_graph, out);
    of.look_around();
    return of.open_written();
}

} // namespace xq
