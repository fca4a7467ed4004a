/* api.cu: the verbs of xq_cuda(): checks arguments, chooses kernels.
 *
 * check.h says what every backend refuses; here stands what a GPU cannot do besides: read 16 bytes at an address that
 * is not a multiple of 16, and have more than 65,535 blocks along y or z.
 */
#include "check.h"
#include "launch.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>

namespace xq {

static thread_local char message[512];
static constexpr int max_devices = 64;
static constexpr int max_blocks = 65535; /* along y or z of a grid */

int fail(int status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof(message), format, args);
    va_end(args);
    return status;
}

int launched(const char *what) {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? XQ_OK
                                : fail(XQ_ERR_KERNELS, "%s could not be launched: %s", what, cudaGetErrorString(error));
}

/* An attribute of the current device, asked once; known: 0 where it was not. */
static int attribute(cudaDeviceAttr name, std::atomic<int> (&known)[max_devices]) {
    int device = 0, value = 0;
    cudaGetDevice(&device);
    if (device < max_devices && known[device] > 0) {
        return known[device];
    }
    cudaDeviceGetAttribute(&value, name, device);
    if (device < max_devices) {
        known[device] = value;
    }
    return value;
}

int shared_limit() {
    static std::atomic<int> limits[max_devices];
    return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, limits);
}

static int capability() {
    static std::atomic<int> majors[max_devices];
    return attribute(cudaDevAttrComputeCapabilityMajor, majors);
}

bool can_launch_early() {
    return capability() >= 9;
}

bool has_wgmma() {
    return capability() == 9;
}

int processors() {
    static std::atomic<int> numbers[max_devices];
    return attribute(cudaDevAttrMultiProcessorCount, numbers);
}

/* ---- what a GPU cannot do ---- */

static int64_t address(const void *p) {
    return (int64_t)(uintptr_t)p;
}

/* verb: for the message. */
static bool is_aligned(const char *verb, const xq_side_store &side) {
    return multiples(verb, {{"address of codes", address(side.codes), 16},
                            {"codes_page", side.codes_page, 16},
                            {"codes_head", side.codes_head, 16},
                            {"codes_stream", side.codes_stream, 16},
                            {"address of param", address(side.param), 16},
                            {"param_page", side.param_page, 16},
                            {"param_head", side.param_head, 16},
                            {"param_stream", side.param_stream, 16},
                            {"address of rows", address(side.rows), 16},
                            {"address of the stage", address(side.stage), 16},
                            {"rows_head", side.rows_head, 8},
                            {"rows_stream", side.rows_stream, 8},
                            {"address of bytes", address(side.bytes), 16},
                            {"bytes_slot", side.bytes_slot, 16},
                            {"bytes_head", side.bytes_head, 16},
                            {"bytes_stream", side.bytes_stream, 16}});
}

static bool is_aligned(const xq_store &store) {
    return is_aligned("store.k on a GPU", store.k) && is_aligned("store.v on a GPU", store.v) &&
           (!store.mapped || is_aligned("store.source on a GPU", store.source));
}

static bool runs(const char *verb, const xq_exec *exec) {
    return none_null(verb, {{"exec", exec}});
}

static cudaStream_t cuda_stream(const xq_exec *exec) {
    return (cudaStream_t)exec->cuda_stream;
}

/* ---- verbs ---- */

static const char *error() {
    return message;
}

static int update(const xq_store *store, const xq_update_args *args, const xq_exec *exec) {
    if (!runs("update", exec) || !accepts_update(store, args) || !is_aligned(*store) ||
        !in_range("update on a GPU",
                  {{"n_seals", args->n_seals, 0, max_blocks}, {"n_unseals", args->n_unseals, 0, max_blocks}})) {
        return XQ_ERR_ARGUMENT;
    }
    return launch_update(*store, *args, cuda_stream(exec));
}

/* Blocks of both kernels, and row numbers times heads, which are divided by multiplying (decode_shape.h). */
static bool fits_grid(const xq_store &store, const xq_attend_args &args) {
    const int64_t n_rep = args.n_head / store.n_head_kv, n_rows = args.n_tokens * n_rep; // of a KV head
    const int64_t n_groups = (n_rows + XQ_CUDA_GROUP_ROWS - 1) / XQ_CUDA_GROUP_ROWS;
    const char *verb = "attend on a GPU";
    return in_range(verb, {{"n_streams * n_tokens", (int64_t)args.n_streams * args.n_tokens, 1, max_blocks},
                           {"n_streams * groups of query rows", args.n_streams * n_groups, 1, max_blocks}}) &&
           in_range(verb, {{"n_tokens * (n_head / n_head_kv)^2", n_rows * n_rep, 1, INT32_MAX}});
}

static int attend(const xq_store *store, const xq_attend_args *args, const xq_exec *exec) {
    if (!runs("attend", exec) || !accepts_attend(store, args) || !is_aligned(*store) || !fits_grid(*store, *args) ||
        !multiples("attend on a GPU", {{"address of q", address(args->q), 16},
                                       {"q_head_stride", args->q_head_stride, 16},
                                       {"q_token_stride", args->q_token_stride, 16},
                                       {"address of mask", address(args->mask), 8},
                                       {"mask_token_stride", args->mask ? args->mask_token_stride : 0, 8},
                                       {"mask_stream_stride", args->mask ? args->mask_stream_stride : 0, 8},
                                       {"address of partial", address(args->partial), 8},
                                       {"address of out", address(args->out), 8}})) {
        return XQ_ERR_ARGUMENT;
    }
    if (args->n_kv_pages > (int64_t)args->n_parts * XQ_CUDA_PART_PAGES) {
        return fail(XQ_ERR_ARGUMENT, "attend on a GPU: n_kv_pages is %d in n_parts, %d; a part has at most %d",
                    args->n_kv_pages, args->n_parts, XQ_CUDA_PART_PAGES);
    }
    if (decode_covers(*store)) {
        return launch_decode(*store, *args, cuda_stream(exec));
    }
    if (wide_covers(*store)) {
        return launch_wide(*store, *args, cuda_stream(exec));
    }
    const int status = launch_general(*store, *args, cuda_stream(exec));
    return status != XQ_OK ? status : launch_merge(*store, *args, cuda_stream(exec));
}

static int unpack(const xq_store *store, const xq_unpack_args *args, const xq_exec *exec) {
    if (!runs("unpack", exec) || !accepts_unpack(store, args) || !is_aligned(*store) ||
        !multiples("unpack on a GPU", {{"address of rows", address(args->rows), 16}}) ||
        !in_range("unpack on a GPU",
                  {{"n_kv_pages", args->n_kv_pages, 1, max_blocks},
                   {"n_streams * n_heads", (int64_t)args->n_streams * args->n_heads, 1, max_blocks}})) {
        return XQ_ERR_ARGUMENT;
    }
    return launch_unpack(*store, *args, cuda_stream(exec));
}

static bool accepts_gpu_keys(const char *verb, const xq_store *store, const xq_keys_args *args, const xq_exec *exec) {
    return runs(verb, exec) && accepts_keys(verb, store, args) && is_aligned(*store) &&
           in_range(verb, {{"n_pages on a GPU", args->n_pages, 1, max_blocks}});
}

static int read_keys(const xq_store *store, const xq_keys_args *args, const xq_exec *exec) {
    return accepts_gpu_keys("read_keys", store, args, exec) ? launch_read_keys(*store, *args, cuda_stream(exec))
                                                            : XQ_ERR_ARGUMENT;
}

static int write_keys(const xq_store *store, const xq_keys_args *args, const xq_exec *exec) {
    return accepts_gpu_keys("write_keys", store, args, exec) ? launch_write_keys(*store, *args, cuda_stream(exec))
                                                             : XQ_ERR_ARGUMENT;
}

static int64_t rows_scratch(const xq_rows_args *args) {
    return args && prompt_covers(*args) ? prompt_scratch(*args) : -1;
}

static int attend_rows(const xq_rows_args *args, const xq_exec *exec) {
    const char *verb = "attend_rows";
    if (!runs(verb, exec) || !none_null(verb, {{"args", args}}) ||
        !none_null(verb, {{"q", args->q},
                          {"k", args->k},
                          {"v", args->v},
                          {"mask", args->mask},
                          {"scratch", args->scratch},
                          {"out", args->out}}) ||
        !multiples(verb, {{"address of scratch", address(args->scratch), 16}})) {
        return XQ_ERR_ARGUMENT;
    }
    return prompt_covers(*args)
               ? launch_prompt(*args, cuda_stream(exec))
               : fail(XQ_ERR_ARGUMENT, "attend_rows: this device has no kernel for these rows; see rows_scratch");
}

static const char *attend_kernel(const xq_store *store) {
    return !accepts_store(store)   ? nullptr
           : decode_covers(*store) ? "decode"
           : wide_covers(*store)   ? "wide"
                                   : "general";
}

} // namespace xq

const xq_backend *xq_cuda(void) {
    static const xq_backend backend = {"cuda",           xq::error,      xq::update,     xq::attend,
                                       xq::unpack,       xq::read_keys,  xq::write_keys, xq::attend_kernel,
                                       xq::rows_scratch, xq::attend_rows};
    return &backend;
}
