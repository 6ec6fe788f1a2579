/* Surviving a front end that truncates the file behind guest memory (R-RING-82).
 *
 * Touching a page beyond the file's end raises SIGBUS. If the page belongs to a guarded range, the handler puts a page
 * of zeros in its place and sets the range's flag: the access goes on, and the caller looks at the flag afterwards.
 * Every other SIGBUS goes to whoever handled it before.
 *
 * Guards are added and removed by threads that hold the interpreter lock. The handler, which may run at any time in any
 * thread, only reads: a guard is never freed, only reused, and `start` is its last word to appear and first to vanish.
 */
#ifndef VSPORT_SIGBUS_H
#define VSPORT_SIGBUS_H

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "_atomics.h"

struct vs_guard {
    _Atomic(uintptr_t) start; /* 0: free */
    uintptr_t end;
    int *lost;
    struct vs_guard *next;
};

static _Atomic(struct vs_guard *) vs_guards;
static struct sigaction vs_previous_sigbus;
static uintptr_t vs_page_size;

static struct vs_guard *vs_guard_at(uintptr_t address)
{
    struct vs_guard *guard = atomic_load_explicit(&vs_guards, memory_order_acquire);
    for (; guard; guard = guard->next) {
        uintptr_t start = atomic_load_explicit(&guard->start, memory_order_acquire);
        if (start && address >= start && address < guard->end)
            return guard;
    }
    return NULL;
}

static int vs_put_zeros(uintptr_t start, uintptr_t size)
{
    return mmap((void *)start, size, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        != MAP_FAILED;
}

/* Replaces the page at `address`; memory on huge pages can only be replaced in whole huge pages. */
static int vs_replace_page(const struct vs_guard *guard, uintptr_t address)
{
    static const uintptr_t huge[] = {(uintptr_t)2 << 20, (uintptr_t)1 << 30};
    if (vs_put_zeros(address & -vs_page_size, vs_page_size))
        return 1;
    for (size_t i = 0; i < sizeof huge / sizeof *huge; i++) {
        uintptr_t start = address & -huge[i];
        if (start >= guard->start && huge[i] <= guard->end - start && vs_put_zeros(start, huge[i]))
            return 1;
    }
    return 0;
}

static void vs_pass_on_sigbus(int number, siginfo_t *info, void *context)
{
    if (vs_previous_sigbus.sa_flags & SA_SIGINFO)
        vs_previous_sigbus.sa_sigaction(number, info, context);
    else if (vs_previous_sigbus.sa_handler != SIG_DFL && vs_previous_sigbus.sa_handler != SIG_IGN)
        vs_previous_sigbus.sa_handler(number);
    else {
        signal(number, SIG_DFL); /* the access is repeated, and ends the process as it would have without us */
        if (info->si_code <= 0)
            raise(number); /* sent by a process: there is no access to repeat */
    }
}

static void vs_on_sigbus(int number, siginfo_t *info, void *context)
{
    int saved = errno;
    uintptr_t address = (uintptr_t)info->si_addr;
    struct vs_guard *guard = info->si_code == BUS_ADRERR ? vs_guard_at(address) : NULL;
    if (guard && vs_replace_page(guard, address))
        vs_flag_set(guard->lost);
    else
        vs_pass_on_sigbus(number, info, context);
    errno = saved;
}

static int vs_install_sigbus(void)
{
    struct sigaction action = {.sa_flags = SA_SIGINFO | SA_ONSTACK};
    if (vs_page_size)
        return 1;
    action.sa_sigaction = vs_on_sigbus;
    sigemptyset(&action.sa_mask);
    vs_page_size = (uintptr_t)sysconf(_SC_PAGESIZE);
    return sigaction(SIGBUS, &action, &vs_previous_sigbus) == 0;
}

static struct vs_guard *vs_guard_unused(void)
{
    struct vs_guard *guard = atomic_load_explicit(&vs_guards, memory_order_relaxed);
    while (guard && atomic_load_explicit(&guard->start, memory_order_relaxed))
        guard = guard->next;
    if (guard || !(guard = calloc(1, sizeof *guard)))
        return guard;
    guard->next = atomic_load_explicit(&vs_guards, memory_order_relaxed);
    atomic_store_explicit(&vs_guards, guard, memory_order_release);
    return guard;
}

/* Guards `size` bytes from `start`; `*lost` becomes 1 when one of their pages is gone. NULL: errno says why not. */
static inline struct vs_guard *vs_guard_add(void *start, size_t size, int *lost)
{
    struct vs_guard *guard = vs_install_sigbus() ? vs_guard_unused() : NULL;
    if (!guard)
        return NULL;
    guard->end = (uintptr_t)start + size;
    guard->lost = lost;
    atomic_store_explicit(&guard->start, (uintptr_t)start, memory_order_release);
    return guard;
}

static inline void vs_guard_remove(struct vs_guard *guard)
{
    atomic_store_explicit(&guard->start, 0, memory_order_release);
}

#endif
