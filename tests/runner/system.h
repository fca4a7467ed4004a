/* system.h: what the runner asks of the operating system. */
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef _WIN32
#include <windows.h>

#include <fcntl.h>
#include <io.h>

#include <cstdio>
#include <thread>

/* Memory at an address; false: it is taken. */
inline bool map_memory(void *at, size_t n) {
    return VirtualAlloc(at, n, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE) == at;
}

/* Standard input and output carry bytes as they are, not lines. */
inline void pass_bytes() {
    _setmode(_fileno(stdin), _O_BINARY);
    _setmode(_fileno(stdout), _O_BINARY);
}

class small_thread {
  public:
    bool start(void (*run)(void *), void *of) {
        thread = std::thread(run, of);
        return true;
    }
    int64_t join() {
        thread.join();
        return 0;
    }

  private:
    std::thread thread;
};
#else
#include <pthread.h>
#include <sys/mman.h>

#include <vector>

inline bool map_memory(void *at, size_t n) {
    const int how = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
    return mmap(at, n, PROT_READ | PROT_WRITE, how, -1, 0) == at;
}

inline void pass_bytes() {}

/* A thread with 128 KiB of stack. */
class small_thread {
  public:
    bool start(void (*run)(void *), void *of) {
        this->run = run;
        this->of = of;
        stack.assign(stack_bytes + 4096, paint);
        uint8_t *base = stack.data() + 4095 - ((uintptr_t)stack.data() + 4095) % 4096;
        pthread_attr_t attr;
        pthread_attr_init(&attr);
        pthread_attr_setstack(&attr, base, stack_bytes);
        const bool started = pthread_create(&thread, &attr, enter, this) == 0;
        pthread_attr_destroy(&attr);
        return started;
    }
    /* Most bytes of its stack that it has used. */
    int64_t join() {
        pthread_join(thread, nullptr);
        size_t untouched = 0;
        while (untouched < stack.size() && stack[untouched] == paint) {
            untouched++;
        }
        return (int64_t)(stack.size() - untouched);
    }

  private:
    static constexpr size_t stack_bytes = 128 << 10;
    static constexpr uint8_t paint = 0xc3;
    void (*run)(void *);
    void *of;
    pthread_t thread;
    std::vector<uint8_t> stack;

    static void *enter(void *self) {
        auto &t = *(small_thread *)self;
        t.run(t.of);
        return nullptr;
    }
};
#endif
