#include "parallel.h"

#include "interface.h"

/* The entry point that GCC compiles `#pragma omp parallel` into; LLVM's and Intel's runtimes have it too. */
static void (*openmp_parallel)(void (*)(void *), void *, unsigned, unsigned);
static int (*openmp_thread_num)(void);
static int (*openmp_num_threads)(void);

struct loop {
    task *run;
    void *context;
    int tasks;
};

static void run_share(void *data) {
    const struct loop *loop = data;
    /* The runtime may give fewer threads than asked for. */
    const int worker = openmp_thread_num(), workers = openmp_num_threads();
    const int from = (int)((int64_t)loop->tasks * worker / workers);
    const int to = (int)((int64_t)loop->tasks * (worker + 1) / workers);
    for (int index = from; index < to; index++) loop->run(loop->context, index, worker);
}

void run_tasks(int threads, int tasks, task *run, void *context) {
    struct loop loop = {run, context, tasks};
    if (threads > tasks) threads = tasks;
    if (threads > 1 && openmp_parallel) {
        openmp_parallel(run_share, &loop, (unsigned)threads, 0);
    } else {
        for (int index = 0; index < tasks; index++) run(context, index, 0);
    }
}

EXPORT void nm_use_openmp(void *parallel, void *thread_num, void *num_threads) {
    openmp_parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))parallel;
    openmp_thread_num = (int (*)(void))thread_num;
    openmp_num_threads = (int (*)(void))num_threads;
}
