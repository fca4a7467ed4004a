/* runner.cpp: makes calls to libxquant that are read from a file, writes what comes back: runner CALLS RESULTS.
 *
 * Calls and results are lists of byte strings, each as its length (u64) and its bytes.  A call is the name of a
 * function and its arguments as emulated.py writes them: arrays as they lie in memory, an empty string for null, and
 * numbers as i64.  Its results: the status (i64), the message if it is negative, then what the function wrote.
 */
#include "xquant.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

FILE *calls, *results;

std::string read_bytes() {
    uint64_t n;
    if (fread(&n, sizeof(n), 1, calls) != 1) {
        return "end";
    }
    std::string bytes(n, '\0');
    if (fread(&bytes[0], 1, n, calls) != n) {
        fprintf(stderr, "runner: the file of calls ends within a call\n");
        exit(1);
    }
    return bytes;
}

/* An array in memory of its own, so that reading past its end is noticed by a sanitizer; null if it is empty. */
template <typename T> struct array {
    std::vector<T> values;
    array() {
        const std::string bytes = read_bytes();
        values.resize(bytes.size() / sizeof(T));
        if (!bytes.empty()) {
            memcpy(values.data(), bytes.data(), bytes.size());
        }
    }
    T *get() { return values.empty() ? nullptr : values.data(); }
};

int64_t number() {
    return *array<int64_t>().get();
}

void write_bytes(const void *bytes, uint64_t n) {
    fwrite(&n, sizeof(n), 1, results);
    fwrite(bytes, 1, n, results);
}
void write_status(int64_t status) {
    write_bytes(&status, sizeof(status));
    if (status < 0) {
        write_bytes(xq_error(), strlen(xq_error()));
    }
}
template <typename T> void write_array(const std::vector<T> &values) {
    write_bytes(values.data(), values.size() * sizeof(T));
}

void seal(bool is_k) {
    array<xq_side> side;
    const int64_t width = number(), n_codes = number(), n_param = number();
    array<uint16_t> rows;
    array<uint32_t> valid;
    array<uint8_t> owner;
    array<float> predicted;
    std::vector<uint8_t> codes(n_codes), param(n_param);
    write_status(is_k ? xq_seal_k(side.get(), width, rows.get(), width, valid.get(), codes.data(), param.data(),
                                  owner.get(), side.get()->bits)
                      : xq_seal_v(side.get(), width, rows.get(), width, valid.get(), codes.data(), param.data(),
                                  owner.get(), side.get()->bits, predicted.get()));
    write_array(codes);
    write_array(param);
}

void unseal(bool is_k) {
    array<xq_side> side;
    const int64_t width = number();
    array<uint8_t> codes, param;
    array<float> predicted;
    std::vector<uint16_t> rows(XQ_PAGE * width);
    const int bits = side.get()->bits;
    write_status(
        is_k ? xq_unseal_k(side.get(), width, codes.get(), bits, param.get(), rows.data(), width)
             : xq_unseal_v(side.get(), width, codes.get(), bits, param.get(), rows.data(), width, predicted.get()));
    write_array(rows);
}

void predict() {
    array<xq_side> side;
    const int64_t width = number();
    array<uint8_t> codes, param;
    array<float> weight;
    std::vector<float> predicted(width * XQ_PAGE);
    write_status(xq_predict_v(side.get(), width, codes.get(), param.get(), weight.get(), predicted.data()));
    write_array(predicted);
}

/* All rows over all pages, cut into parts at the given page numbers, and merged. */
void attend() {
    array<xq_attention> args; // with any pointers
    xq_attention &a = *args.get();
    array<int64_t> edges;
    float sink;
    memcpy(&sink, array<float>().get(), sizeof(sink));
    array<uint8_t> k_codes, k_param, v_codes, v_param, source_codes, source_param;
    array<uint16_t> k_window, v_window;
    array<int32_t> page_slot;
    array<float> q, slope, weight;
    array<uint16_t> mask;
    a.k_codes = k_codes.get(), a.k_param = k_param.get(), a.v_codes = v_codes.get(), a.v_param = v_param.get();
    a.source_codes = source_codes.get(), a.source_param = source_param.get();
    a.k_window = k_window.get(), a.v_window = v_window.get(), a.page_slot = page_slot.get();
    a.slope = slope.get();
    const int64_t n_mask = (int64_t)page_slot.values.size() * XQ_PAGE, n_state = (a.mapped ? 3 : 2) * a.e + 2;
    std::vector<const float *> q_rows;
    std::vector<const uint16_t *> mask_rows;
    for (int row = 0; row < a.n_rows; ++row) {
        q_rows.push_back(q.get() + row * a.d);
        mask_rows.push_back(mask.get() + row * n_mask);
    }
    a.q = q_rows.data(), a.mask = mask_rows.data();

    const int n_parts = (int)edges.values.size() - 1;
    std::vector<std::vector<float>> states(a.n_rows * n_parts, std::vector<float>(n_state));
    int64_t status = XQ_OK;
    for (int part = 0; part < n_parts && status == XQ_OK; ++part) {
        std::vector<float *> partial;
        for (int row = 0; row < a.n_rows; ++row) {
            partial.push_back(states[row * n_parts + part].data());
        }
        a.partial = partial.data(), a.page_begin = edges.values[part], a.page_end = edges.values[part + 1];
        status = xq_attend(&a);
    }
    std::vector<float> out((int64_t)a.n_rows * a.e);
    for (int row = 0; row < a.n_rows && status == XQ_OK; ++row) {
        std::vector<const float *> merged;
        for (int part = 0; part < n_parts; ++part) {
            merged.push_back(states[row * n_parts + part].data());
        }
        status = xq_attention_merge(n_parts, merged.data(), a.e, a.v.rotate, sink, a.mapped ? weight.get() : nullptr,
                                    out.data() + (int64_t)row * a.e);
    }
    write_status(status);
    write_array(out);
}

} // namespace

int main(int argc, char **argv) {
    calls = argc == 3 ? fopen(argv[1], "rb") : nullptr;
    results = argc == 3 ? fopen(argv[2], "wb") : nullptr;
    if (!calls || !results) {
        fprintf(stderr, "usage: runner CALLS RESULTS\n");
        return 1;
    }
    for (std::string name; (name = read_bytes()) != "end";) {
        if (name == "available") {
            write_status(0);
            write_bytes(xq_kernels_available(), strlen(xq_kernels_available()));
        } else if (name == "kernels") {
            const char *set = xq_kernels();
            write_status(set ? 0 : XQ_ERR_KERNELS);
            write_bytes(set, set ? strlen(set) : 0);
        } else if (name == "force") {
            write_status(xq_kernels_force(read_bytes().c_str()));
        } else if (name == "calls") {
            write_status((int64_t)xq_kernels_calls(read_bytes().c_str()));
        } else if (name == "seal_k" || name == "seal_v") {
            seal(name == "seal_k");
        } else if (name == "unseal_k" || name == "unseal_v") {
            unseal(name == "unseal_k");
        } else if (name == "predict_v") {
            predict();
        } else if (name == "attend") {
            attend();
        } else {
            fprintf(stderr, "runner: no function is called %s\n", name.c_str());
            return 1;
        }
    }
    return fclose(results) == 0 ? 0 : 1;
}
