/* api.cu: the C ABI of xquant_cuda.h: checks arguments, chooses kernels. */
#include "launch.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>

namespace xq {

static thread_local char message[256];
static constexpr int max_devices = 64;

static int fail_cuda(int status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof(message), format, args);
    va_end(args);
    return status;
}

int launched(const char *what) {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess
               ? XQ_OK
               : fail_cuda(XQ_ERR_KERNELS, "%s could not be launched: %s", what, cudaGetErrorString(error));
}

int shared_limit() {
    static std::atomic<int> limits[max_devices]; // asked at every launch; 0: not asked yet
    int device = 0, bytes = 0;
    cudaGetDevice(&device);
    if (device < max_devices && limits[device] > 0) {
        return limits[device];
    }
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (device < max_devices) {
        limits[device] = bytes;
    }
    return bytes;
}

static bool width_ok(int32_t n) {
    return n >= 16 && n <= XQ_MAX_HEAD_DIM && n % 16 == 0;
}

bool can_launch_early() {
    static std::atomic<int> majors[max_devices];
    int device = 0, major = 0;
    cudaGetDevice(&device);
    if (device < max_devices && majors[device] > 0) {
        return majors[device] >= 9;
    }
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (device < max_devices) {
        majors[device] = major;
    }
    return major >= 9;
}

static int check(const xq_cuda_layer *l) {
    if (!l || !width_ok(l->d) || !width_ok(l->e) || l->n_head_kv < 1 || l->n_pages < 1 || l->n_slots < 1) {
        return fail_cuda(XQ_ERR_ARGUMENT, "layer: head widths must be multiples of 16 from 16 to %d", XQ_MAX_HEAD_DIM);
    }
    if (!l->blocks || !l->k_blocks || !l->v_blocks || !l->window ||
        (l->mapped && (!l->source_blocks || !l->map_heads || !l->map))) {
        return fail_cuda(XQ_ERR_ARGUMENT, "layer: blocks, window and map must not be null");
    }
    return XQ_OK;
}

} // namespace xq

using namespace xq;

const char *xq_cuda_error(void) {
    return message;
}

int xq_cuda_update(const xq_cuda_layer *layer, const xq_cuda_update_args *args, void *stream) {
    if (const int status = check(layer); status != XQ_OK) {
        return status;
    }
    if (!args || args->n_tokens < 0 || !args->n_seal || !args->n_unseal || !args->n_nonfinite) {
        return fail_cuda(XQ_ERR_ARGUMENT, "update: counts must not be null");
    }
    return launch_update(*layer, *args, (cudaStream_t)stream);
}

const char *xq_cuda_attend_kernel(const xq_cuda_layer *layer) {
    return decode_covers(*layer) ? "decode" : "general";
}

int xq_cuda_attend(const xq_cuda_layer *layer, const xq_cuda_attend_args *args, void *stream) {
    if (const int status = check(layer); status != XQ_OK) {
        return status;
    }
    if (!args || !args->q || !args->table || !args->partial || !args->out || !args->arrivals || args->n_head < 1 ||
        args->n_head % layer->n_head_kv != 0 || args->n_tokens < 1 || args->n_streams < 1 || args->n_parts < 1 ||
        args->n_kv_pages < 0 || args->scale <= 0.0f || args->n_kv_pages > layer->n_pages) {
        return fail_cuda(XQ_ERR_ARGUMENT, "attend: a pointer is null or a count is out of range");
    }
    if (args->n_kv_pages > (int64_t)args->n_parts * XQ_CUDA_PART_PAGES) {
        return fail_cuda(XQ_ERR_ARGUMENT, "attend: %d pages in %d parts, must be at most %d each", args->n_kv_pages,
                         args->n_parts, XQ_CUDA_PART_PAGES);
    }
    if (decode_covers(*layer)) {
        return launch_decode(*layer, *args, (cudaStream_t)stream);
    }
    const int status = launch_general(*layer, *args, (cudaStream_t)stream);
    return status != XQ_OK ? status : launch_merge(*layer, *args, (cudaStream_t)stream);
}

int xq_cuda_unpack(const xq_cuda_layer *layer, const xq_cuda_unpack_args *args, void *stream) {
    if (const int status = check(layer); status != XQ_OK) {
        return status;
    }
    if (!args || !args->table || !args->first_stream || !args->rows || args->n_streams < 1 || args->n_kv_pages < 1 ||
        args->n_kv_pages > layer->n_pages || args->first_head < 0 || args->n_heads < 1 ||
        args->n_heads > layer->n_head_kv - args->first_head) {
        return fail_cuda(XQ_ERR_ARGUMENT, "unpack: a pointer is null or a count is out of range");
    }
    return launch_unpack(*layer, *args, (cudaStream_t)stream);
}

static int check_shift(const xq_cuda_layer *layer, const xq_cuda_shift_args *args) {
    if (const int status = check(layer); status != XQ_OK) {
        return status;
    }
    return args && args->pages && args->keys && args->n_pages >= 1
               ? XQ_OK
               : fail_cuda(XQ_ERR_ARGUMENT, "shift: a pointer is null or there are no pages");
}

int xq_cuda_read_keys(const xq_cuda_layer *layer, const xq_cuda_shift_args *args, void *stream) {
    const int status = check_shift(layer, args);
    return status == XQ_OK ? launch_read_keys(*layer, *args, (cudaStream_t)stream) : status;
}

int xq_cuda_write_keys(const xq_cuda_layer *layer, const xq_cuda_shift_args *args, void *stream) {
    const int status = check_shift(layer, args);
    return status == XQ_OK ? launch_write_keys(*layer, *args, (cudaStream_t)stream) : status;
}
