/* find_cells.cpp: cells for new tokens; page_table.h has the rule of writing. */
#include "page_table.h"

#include <algorithm>
#include <set>

namespace xq {

/* One call of find_cells(). */
class page_table::search {
  public:
    search(const page_table &table, const cell_view &cells, int32_t stream, uint32_t head)
        : table(table), cells(cells), stream(stream),
          first((int32_t)(std::min<uint32_t>(head, table.shape_.n_cells - 1) / XQ_PAGE)), taken(table.shape_.n_pages()),
          writer(table.shape_.n_pages(), nobody),
          left_open(table.seals() ? std::max(table.shape_.n_slots - table.shape_.reserved, 1) : table.shape_.n_pages()),
          left_empty(table.seals() ? table.shape_.staged : table.shape_.n_pages()) {}

    /* Appends n cells for a sequence; false: there are too few. */
    bool find(int32_t sequence, size_t n, std::vector<uint32_t> &out) {
        const size_t wanted = out.size() + n;
        for (const auto kind : {own_rows, own_open, empty, any_open, any}) {
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
    enum kind { own_rows, own_open, empty, any_open, any };
    static constexpr int32_t nobody = -1, several = -2;

    bool is_full(int32_t page) const { return taken[page] == ~0u; }
    bool is_touched(int32_t page) const { return writer[page] != nobody; }
    /* Cells of a page that is neither open nor sealed: an earlier micro-batch of the same batch will open it. */
    bool has_rows(int32_t page) const {
        const int32_t state = table.state(stream, page);
        return state >= 0 || (state == XQ_SLOT_NONE && cells.is_any_used(stream, page));
    }
    bool is_open(int32_t page) const { return has_rows(page) || is_bytes(table.state(stream, page)); }

    bool is(kind wanted, int32_t page, int32_t sequence) const {
        switch (wanted) {
        case own_rows: // open before, or for this sequence's last cells
        case own_open:
            if (is_touched(page) ? writer[page] != sequence : wanted == own_rows ? !has_rows(page) : !is_open(page)) {
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
        int32_t &left = cells.is_any_used(stream, page) ? left_open : left_empty;
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
    std::vector<uint32_t> taken;   /* [page]: cells that the search went past; ~0: all */
    std::vector<int32_t> writer;   /* [page]: the sequence that writes into it */
    int32_t left_open, left_empty; /* pages with and without cells that may be touched besides */
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

} // namespace xq
