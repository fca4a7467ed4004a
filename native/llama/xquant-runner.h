/* xquant-runner.h: runs small graphs of our own beside a context's: moves of pages, context shifts.
 *
 * Devices are the context's own backends, whose streams keep the order of what was enqueued.  The CPU is a backend of
 * our own: a context's may be told to abort, and a page that is half moved would be lost.
 */
#pragma once

#include "ggml-cpp.h"

#include <functional>
#include <map>
#include <vector>

namespace xquant {

class runner {
  public:
    /* The backends and threads of the context that uses the cache; what was enqueued on them comes first. */
    void attach(ggml_backend_sched_t sched, int n_threads);

    /* Waits for what was enqueued on devices. */
    void synchronize();

    /* Builds a graph of at most n_nodes nodes, calls fill() when its inputs have memory, and runs it to its end; false:
     * it could not be run. */
    bool run(size_t n_nodes, const std::function<void(ggml_context *, ggml_cgraph *)> &build,
             const std::function<void()> &fill);

    /* The backend that nodes on such buffers run on. */
    ggml_backend_t backend_of(ggml_backend_buffer_type_t buft);
    /* For nodes of the graph that is being built: where they are to run. */
    void place(ggml_tensor *node, ggml_backend_buffer_type_t buft);

  private:
    ggml_backend_sched_t sched(size_t n_nodes);

    std::map<ggml_backend_dev_t, ggml_backend_t> devices_; /* of the context, or of `own_` */
    std::vector<ggml_backend_ptr> own_;                    /* made for a cache that no context has used yet */
    ggml_backend_ptr cpu_;
    ggml_backend_sched_ptr sched_;
    size_t sched_nodes_ = 0; /* that sched_ has room for */
    int n_threads_ = 1;
};

} // namespace xquant
