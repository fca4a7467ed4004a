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

/* What a worker says of itself (xquant_worker() in xquant-ops.h); -1: the device is no worker's. */
static int said_by(ggml_backend_dev_t device) {
    const auto said = function_of<said_fn>(device, "ggml_backend_rpc_xquant");
    return said ? said(device) : -1;
}

/* f(worker, what tells its endpoint once it is lost) of each worker of a scheduler until one gives true; whether one
 * did. */
template <typename F> static bool any_worker(ggml_backend_sched_t sched, const F &f) {
    for (int i = 0; sched && i < ggml_backend_sched_get_n_backends(sched); ++i) {
        ggml_backend_t backend = ggml_backend_sched_get_backend(sched, i);
        const auto lost = function_of<lost_fn>(ggml_backend_get_device(backend), "ggml_backend_rpc_lost");
        if (lost && f(backend, lost)) {
            return true;
        }
    }
    return false;
}

bool is_worker(ggml_backend_dev_t device) {
    return function_of<said_fn>(device, "ggml_backend_rpc_xquant") != nullptr;
}

bool runs_on(ggml_backend_dev_t device) {
    if (const int said = said_by(device); said >= 0) {
        const int version = said & ~XQUANT_WORKER_CPU;
        if (version != XQUANT_WORKER_VERSION) {
            refuse("the worker at " + std::string(ggml_backend_dev_description(device)) +
                   (version == 0 ? " has no XQuant operations, or not on all of its devices"
                                 : " is of another version of xquant_gguf") +
                   "; start there what `xquant-gguf run rpc-server` starts here, of the same version, or use the cache "
                   "type f16");
        }
        return true;
    }
    const bool known = has_kernels(device);
    if (!known) {
        LLAMA_LOG_WARN(
            "%s: xquant: no XQuant kernels; the cache and the attention of its layers stay on the CPU, which "
            "is slower\n",
            ggml_backend_dev_name(device));
    }
    return known;
}

int64_t most_bytes(ggml_backend_dev_t device) {
    return said_by(device) >= 0 ? UINT32_MAX : INT64_MAX;
}

bool has_cpu_kernels(ggml_backend_dev_t device) {
    const int said = said_by(device);
    return said >= 0 ? (said & XQUANT_WORKER_CPU) != 0 : ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

const char *lost_worker(ggml_backend_sched_t sched) {
    const char *endpoint = nullptr;
    any_worker(sched, [&](ggml_backend_t worker, lost_fn lost) { return (endpoint = lost(worker)) != nullptr; });
    return endpoint;
}

/* ---- what llama.cpp calls ---- */

int with_all_workers(llama_context &context, int result) {
    if (!any_worker(context.get_sched(), [](ggml_backend_t, lost_fn) { return true; })) {
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
