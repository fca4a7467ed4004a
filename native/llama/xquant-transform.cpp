/* xquant-transform.cpp: see xquant-transform.h. */
#include "xquant-transform.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace xquant {

static constexpr double largest_half = 65504.0;

/* Gauss and Jordan, with the largest pivot of each column.  a [d][d], destroyed; out [d][d]: its inverse. */
static bool invert(std::vector<double> &a, std::vector<double> &out, size_t d) {
    std::fill(out.begin(), out.end(), 0.0);
    for (size_t i = 0; i < d; ++i) {
        out[i * d + i] = 1.0;
    }
    for (size_t j = 0; j < d; ++j) {
        size_t pivot = j;
        for (size_t i = j + 1; i < d; ++i) {
            pivot = std::fabs(a[i * d + j]) > std::fabs(a[pivot * d + j]) ? i : pivot;
        }
        if (!(std::fabs(a[pivot * d + j]) > 0.0)) {
            return false;
        }
        std::swap_ranges(&a[j * d], &a[j * d] + d, &a[pivot * d]);
        std::swap_ranges(&out[j * d], &out[j * d] + d, &out[pivot * d]);
        const double scale = 1.0 / a[j * d + j];
        for (size_t k = 0; k < d; ++k) {
            a[j * d + k] *= scale;
            out[j * d + k] *= scale;
        }
        for (size_t i = 0; i < d; ++i) {
            const double by = i == j ? 0.0 : a[i * d + j];
            for (size_t k = 0; k < d && by != 0.0; ++k) {
                a[i * d + k] -= by * a[j * d + k];
                out[i * d + k] -= by * out[j * d + k];
            }
        }
    }
    return true;
}

bool inverse_transposed(const std::vector<float> &weight, int64_t n_head, int64_t d, std::vector<float> &out) {
    const auto n = (size_t)(d * d);
    out.resize(n * (size_t)n_head);
    std::vector<double> a(n), inverse(n);
    for (size_t h = 0; h < (size_t)n_head; ++h) {
        std::copy_n(weight.begin() + (int64_t)(h * n), n, a.begin());
        if (!invert(a, inverse, (size_t)d)) {
            return false;
        }
        for (size_t i = 0; i < n; ++i) {
            const double value = inverse[i % (size_t)d * (size_t)d + i / (size_t)d];
            if (!(std::fabs(value) <= largest_half)) {
                return false;
            }
            out[h * n + i] = (float)value;
        }
    }
    return true;
}

ggml_tensor *times_matrix(ggml_context *ctx, ggml_tensor *matrix, ggml_tensor *x) {
    ggml_tensor *product = ggml_mul_mat(ctx, matrix, ggml_permute(ctx, x, 0, 2, 1, 3));
    ggml_prec_set_acc(product, GGML_PREC_F32);
    return ggml_permute(ctx, product, 0, 2, 1, 3);
}

} // namespace xquant
