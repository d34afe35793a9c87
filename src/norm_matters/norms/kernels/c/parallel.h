/* One loop over tasks on the threads of an OpenMP runtime that is handed over at run time.
 *
 * torch's own runtime is used, so that there is one pool of threads; without one the loop runs on the caller's thread.
 */
#ifndef NORM_MATTERS_PARALLEL_H
#define NORM_MATTERS_PARALLEL_H

typedef void task(void *context, int index, int worker);

/* Run task 0, 1, ..., tasks - 1; neighbours on the same thread. 0 <= worker < threads. */
void run_tasks(int threads, int tasks, task *run, void *context);

#endif
