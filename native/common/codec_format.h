/* codec_format.h: sizes and tables of the storage format (xquant.h), for CPU and CUDA.
 *
 * XQ_BOTH: a function of host and device.  XQ_LANE, XQ_TABLE: code and tables where the codec runs.
 */
#pragma once

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "xquant: sealed pages are little-endian bytes; big-endian machines are not supported"
#endif

#include "xquant.h"

#if defined(__CUDACC__)
#define XQ_BOTH __host__ __device__ inline
#define XQ_LANE __device__ inline
#define XQ_TABLE __device__ const
#else
#define XQ_BOTH static inline
#define XQ_LANE static inline
#define XQ_TABLE static const
#endif

namespace xq {

XQ_BOTH int units_of(int bits, int n_i) {
    return (n_i * bits + 31) / 32;
}
/* Bytes of 16 columns j. */
XQ_BOTH int column_bytes(int bits, int n_i) {
    return 64 * (bits == 3 ? units_of(2, n_i) + units_of(1, n_i) : units_of(bits, n_i));
}
/* Bytes of a whole matrix of codes. */
XQ_BOTH int64_t packed_bytes(int bits, int n_i, int n_j) {
    return (int64_t)(n_j / 16) * column_bytes(bits, n_i);
}
/* Elements of a group; n: of the whole side. */
XQ_BOTH int group_length(const xq_side &side, int n) {
    return side.group == 0 || side.group > n ? n : side.group;
}
/* Parameters of one group: [2][n_i], or [n_i] without codes. */
XQ_BOTH int parameter_bytes(const xq_side &side, int n_i) {
    return side.bits == 0 ? 2 * n_i : side.param == XQ_PARAM_F16 ? 4 * n_i : 2 * n_i;
}
/* Bytes of a page's codes, 0 where there are none of its own, and of its parameters, one group after the other. */
XQ_BOTH int64_t page_codes_bytes(const xq_side &side, bool is_k, int width) {
    const int n_i = is_k ? width : XQ_PAGE, n_j = is_k ? XQ_PAGE : width;
    return side.bits == 0 || side.owner >= 0 ? 0 : packed_bytes(side.bits, n_i, n_j);
}
XQ_BOTH int64_t page_param_bytes(const xq_side &side, bool is_k, int width) {
    const int n_i = is_k ? width : XQ_PAGE, n_j = is_k ? XQ_PAGE : width;
    return (int64_t)(n_j / group_length(side, n_j)) * parameter_bytes(side, n_i);
}
/* Whether a head may be so wide. */
XQ_BOTH bool is_width(int width) {
    return width >= 16 && width <= XQ_MAX_HEAD_DIM && width % 16 == 0;
}
/* Bytes of one side of a page in bytes: i8 [XQ_PAGE][width], then scales and centres. */
XQ_BOTH int page_in_bytes(bool is_k, int width) {
    return width > 0 ? XQ_PAGE * width + 4 * (is_k ? width : XQ_PAGE) : 0;
}
/* Whether it is CUDA's kernel for heads of 64 and 128 that reads a layer's codes: XQ_CUDA_GROUP_ROWS query rows a
 * block, where the wide kernel may take XQ_CUDA_WIDE_ROWS. */
XQ_BOTH bool is_narrow(const xq_side &k, const xq_side &v, int d, int e) {
    return (d == 64 || d == 128) && e == d && k.bits >= 1 && (v.bits == 1 || v.bits == 2) && group_length(v, e) == e;
}
/* Largest power of two that divides n: the length of a Hadamard block. */
XQ_BOTH int hadamard_block(int n) {
    return n & -n;
}

/* XQ_PARAM_LOG8: 2^(j / 8), and the mantissa bits of 2^((j + 1/2) / 8), where one step rounds to the next. */
constexpr int log8_zero = 161;
XQ_TABLE float log8_steps[8] = {1.0f,        1.09050775f, 1.18920708f, 1.29683959f,
                                1.41421354f, 1.54221082f, 1.68179286f, 1.83400810f};
XQ_TABLE uint32_t log8_thresholds[8] = {0x05aac3, 0x11c3d3, 0x1ef532, 0x2d583f, 0x3d08a4, 0x4e248c, 0x60ccdf, 0x75257d};

/* Shrink ratios that XQ_FIT_CLIP tries. */
XQ_TABLE float clip_one_bit[8] = {0.0f, 0.05f, 0.1f, 0.15f, 0.2f, 0.25f, 0.3f, 0.35f};
XQ_TABLE float clip_more_bits[6] = {0.0f, 0.04f, 0.08f, 0.12f, 0.16f, 0.2f};

/* How much fits are lengthened (codec_fit.h): values, whose error sums over tokens keep, and keys, with scores in
 * between.  Measured on models (docs/quality.md); 1 would about undo the shrinking. */
constexpr float longer_lloyd = 1.25f, longer_clip = 0.6f;

} // namespace xq
