/* The memory ordering of the rings, and nothing else (R-RING-16 to 19).
 *
 * Every index, flag and event field that both sides touch is one aligned little-endian 16-bit word. It is read and
 * written here only, in one access. The callers have checked the alignment (R-RING-09).
 */
#ifndef VSPORT_ATOMICS_H
#define VSPORT_ATOMICS_H

#include <endian.h>
#include <stdatomic.h>
#include <stdint.h>

static inline uint16_t vs_load16(const uint8_t *word)
{
    return le16toh(atomic_load_explicit((const _Atomic(uint16_t) *)word, memory_order_relaxed));
}

/* What the peer stored before it released this word is visible after this load. */
static inline uint16_t vs_load16_acquire(const uint8_t *word)
{
    return le16toh(atomic_load_explicit((const _Atomic(uint16_t) *)word, memory_order_acquire));
}

static inline void vs_store16(uint8_t *word, uint16_t value)
{
    atomic_store_explicit((_Atomic(uint16_t) *)word, htole16(value), memory_order_relaxed);
}

/* Whoever acquires this word sees everything that was stored before. */
static inline void vs_store16_release(uint8_t *word, uint16_t value)
{
    atomic_store_explicit((_Atomic(uint16_t) *)word, htole16(value), memory_order_release);
}

/* Orders a store before a later load: "tell the peer, then look again" needs it on both sides (R-RING-18). */
static inline void vs_full_fence(void)
{
    atomic_thread_fence(memory_order_seq_cst);
}

/* A process-local flag that a signal handler may set. */
static inline int vs_flag_get(const int *flag)
{
    return atomic_load_explicit((const _Atomic(int) *)flag, memory_order_relaxed);
}

static inline void vs_flag_set(int *flag)
{
    atomic_store_explicit((_Atomic(int) *)flag, 1, memory_order_relaxed);
}

#endif
