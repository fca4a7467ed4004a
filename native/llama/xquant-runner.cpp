/* xquant-runner.cpp: see xquant-runner.h. */
#include "xquant-runner.h"

#include "xquant-worker.h"

#include "llama-impl.h"

#include <algorithm>

namespace xquant {

/* Tensors that a node and its sources take, at most. */
static constexpr size_t tensors_a_node = 16;

static bool is_cpu(ggml_backend_dev_t device) {
    return ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

void runner::attach(ggml_backend_sched_t sched, int n_threads) {
    std::map<ggml_backend_dev_t, ggml_backend_t> devices;
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        ggml_backend_t backend = ggml_backend_sched_get_backend(sched, i);
        if (!is_cpu(ggml_backend_get_device(backend))) {
            devices[ggml_backend_get_device(backend)] = backend;
        }
    }
    if (devices != devices_ || n_threads != n_threads_) {
        sched_.reset();
        own_.clear();
        devices_ = devices;
        n_threads_ = n_threads;
    }
}

void runner::synchronize() {
    for (const auto &[device, backend] : devices_) {
        ggml_backend_synchronize(backend);
    }
}

ggml_backend_t runner::backend_of(ggml_backend_buffer_type_t buft) {
    ggml_backend_dev_t device = ggml_backend_buft_is_host(buft) ? nullptr : ggml_backend_buft_get_device(buft);
    if (!device || is_cpu(device)) {
        if (!cpu_) {
            cpu_.reset(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
        }
        return cpu_.get();
    }
    auto found = devices_.find(device);
    if (found == devices_.end()) { // no graph of a context has run yet: there is no order to keep
        own_.emplace_back(ggml_backend_dev_init(device, nullptr));
        found = devices_.emplace(device, own_.back().get()).first;
        sched_.reset();
    }
    return found->second;
}

void runner::place(ggml_tensor *node, ggml_backend_buffer_type_t buft) {
    ggml_backend_sched_set_tensor_backend(sched_.get(), node, backend_of(buft));
}

ggml_backend_sched_t runner::sched(size_t n_nodes) {
    ggml_backend_t cpu = backend_of(ggml_backend_cpu_buffer_type());
    if (!sched_ || sched_nodes_ < n_nodes) {
        auto *reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(cpu));
        auto *set_n_threads =
            (ggml_backend_set_n_threads_t)ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
        if (set_n_threads) {
            set_n_threads(cpu, n_threads_);
        }
        std::vector<ggml_backend_t> backends;
        for (const auto &[device, backend] : devices_) {
            backends.push_back(backend);
        }
        backends.push_back(cpu); // the last one is for what no other can run
        sched_.reset(ggml_backend_sched_new(backends.data(), nullptr, (int)backends.size(), n_nodes * tensors_a_node,
                                            false, false));
        sched_nodes_ = n_nodes;
    }
    return sched_.get();
}

bool runner::run(size_t n_nodes, const std::function<void(ggml_context *, ggml_cgraph *)> &build,
                 const std::function<void()> &fill) {
    const size_t n_tensors = n_nodes * tensors_a_node;
    ggml_init_params params = {};
    params.mem_size = n_tensors * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_tensors, false);
    params.no_alloc = true;
    ggml_context_ptr ctx(ggml_init(params));
    ggml_backend_sched_t own = sched(n_nodes);
    ggml_backend_sched_reset(own);
    ggml_cgraph *graph = ggml_new_graph_custom(ctx.get(), n_tensors, false);
    build(ctx.get(), graph);
    if (!ggml_backend_sched_alloc_graph(own, graph)) {
        LLAMA_LOG_ERROR("xquant: a graph of %d nodes that moves pages could not be allocated\n",
                        ggml_graph_n_nodes(graph));
        return false;
    }
    fill();
    const ggml_status status = ggml_backend_sched_graph_compute(own, graph);
    if (status != GGML_STATUS_SUCCESS) {
        LLAMA_LOG_ERROR("xquant: a graph that moves pages failed: %s\n", ggml_status_to_string(status));
    }
    const char *lost = lost_worker(own);
    if (lost) {
        LLAMA_LOG_ERROR("xquant: a graph that moves pages failed: the worker at %s is lost\n", lost);
    }
    return status == GGML_STATUS_SUCCESS && !lost;
}

} // namespace xquant
