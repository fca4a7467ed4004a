/* xquant-worker.cpp: see xquant-worker.h. */
#include "xquant-worker.h"

#include "xquant-hooks.h"
#include "xquant-kv-cache.h"
#include "xquant-ops.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <stdexcept>
#include <string>

namespace xquant {

/* A function of the RPC backend, if the device is a worker's; else null. */
template <typename F> static F function_of(ggml_backend_dev_t device, const char *name) {
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(device);
    return reg ? (F)ggml_backend_reg_get_proc_address(reg, name) : nullptr;
}

using said_fn = uint8_t (*)(ggml_backend_dev_t);
using lost_fn = const char *(*)(ggml_backend_t);

static bool is_cpu(ggml_backend_dev_t device) {
    return ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

bool runs_on(ggml_backend_dev_t device) {
    if (const auto said = function_of<said_fn>(device, "ggml_backend_rpc_xquant")) {
        const int version = said(device) & ~XQUANT_WORKER_CPU;
        if (version != XQUANT_WORKER_VERSION) {
            refuse("the worker at " + std::string(ggml_backend_dev_description(device)) +
                   (version == 0 ? " has no XQuant operations, or not on all of its devices"
                                 : " is of another version of xquant_gguf") +
                   "; start there what `xquant-gguf run rpc-server` starts here, of the same version, or use the cache "
                   "type f16");
        }
        return true;
    }
    ggml_tensor probe = {};
    probe.op = GGML_OP_XQUANT_UPDATE;
    const bool known = is_cpu(device) || ggml_backend_dev_supports_op(device, &probe);
    if (!known) {
        LLAMA_LOG_WARN(
            "%s: xquant: no XQuant kernels; the cache and the attention of its layers stay on the CPU, which "
            "is slower\n",
            ggml_backend_dev_name(device));
    }
    return known;
}

int64_t most_bytes(ggml_backend_dev_t device) {
    return function_of<said_fn>(device, "ggml_backend_rpc_xquant") ? UINT32_MAX : INT64_MAX;
}

bool has_cpu_kernels(ggml_backend_dev_t device) {
    const auto said = function_of<said_fn>(device, "ggml_backend_rpc_xquant");
    return is_cpu(device) || (said && (said(device) & XQUANT_WORKER_CPU) != 0);
}

const char *lost_worker(ggml_backend_sched_t sched) {
    for (int i = 0; sched && i < ggml_backend_sched_get_n_backends(sched); ++i) {
        ggml_backend_t backend = ggml_backend_sched_get_backend(sched, i);
        const auto lost = function_of<lost_fn>(ggml_backend_get_device(backend), "ggml_backend_rpc_lost");
        if (const char *endpoint = lost ? lost(backend) : nullptr) {
            return endpoint;
        }
    }
    return nullptr;
}

/* ---- what llama.cpp calls ---- */

static bool has_workers(ggml_backend_sched_t sched) {
    for (int i = 0; sched && i < ggml_backend_sched_get_n_backends(sched); ++i) {
        ggml_backend_dev_t device = ggml_backend_get_device(ggml_backend_sched_get_backend(sched, i));
        if (function_of<lost_fn>(device, "ggml_backend_rpc_lost")) {
            return true;
        }
    }
    return false;
}

int with_all_workers(llama_context &context, int result) {
    if (!has_workers(context.get_sched())) {
        return result;
    }
    context.synchronize(); // what was asked of a worker may still be under way
    if (const char *endpoint = lost_worker(context.get_sched())) {
        LLAMA_LOG_ERROR("the worker at %s is lost: load the model again\n", endpoint);
        return -3;
    }
    return result;
}

void require_all_workers(const llama_context &context) {
    if (const char *endpoint = lost_worker(context.get_sched())) {
        throw std::runtime_error("the worker at " + std::string(endpoint) + " is lost: load the model again");
    }
}

} // namespace xquant
