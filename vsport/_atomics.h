/* The memory ordering of what is shared with others, and nothing else.
 *
 * Rings (R-RING-16 to 19): every index, flag and event field that both sides touch is one aligned little-endian word of
 * 16 bits, or 32 for a packed ring's event structure. It is read and written here only, in one access. The callers have checked the alignment (R-RING-09). Dirty logs
 * (R-VU-80) and in-flight regions (R-VU-85) follow below.
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

static inline uint32_t vs_load32(const uint8_t *word)
{
    return le32toh(atomic_load_explicit((const _Atomic(uint32_t) *)word, memory_order_relaxed));
}

static inline void vs_store32(uint8_t *word, uint32_t value)
{
    atomic_store_explicit((_Atomic(uint32_t) *)word, htole32(value), memory_order_relaxed);
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

/* Marks pages. Whoever takes the marks sees what was written to these pages before. */
static inline void vs_mark8(uint8_t *byte, uint8_t bits)
{
    atomic_fetch_or_explicit((_Atomic(uint8_t) *)byte, bits, memory_order_release);
}

/* Takes marks away. Most of a log is empty, and to read is cheaper than to exchange. */
static inline uint8_t vs_take8(uint8_t *byte)
{
    _Atomic(uint8_t) *marks = (_Atomic(uint8_t) *)byte;
    if (!atomic_load_explicit(marks, memory_order_relaxed))
        return 0;
    return atomic_exchange_explicit(marks, 0, memory_order_acquire);
}

/* An in-flight region is in the host's byte order. It is for the time after this process has died, at whatever
 * instruction: so it is the compiler that must not move a write across anything before or after it. */
static inline void vs_note8(uint8_t *field, uint8_t value)
{
    atomic_signal_fence(memory_order_seq_cst);
    atomic_store_explicit((_Atomic(uint8_t) *)field, value, memory_order_relaxed);
    atomic_signal_fence(memory_order_seq_cst);
}

static inline void vs_note16(uint16_t *field, uint16_t value)
{
    atomic_signal_fence(memory_order_seq_cst);
    atomic_store_explicit((_Atomic(uint16_t) *)field, value, memory_order_relaxed);
    atomic_signal_fence(memory_order_seq_cst);
}

static inline void vs_note64(uint64_t *field, uint64_t value)
{
    atomic_signal_fence(memory_order_seq_cst);
    atomic_store_explicit((_Atomic(uint64_t) *)field, value, memory_order_relaxed);
    atomic_signal_fence(memory_order_seq_cst);
}

static inline uint8_t vs_look8(const uint8_t *field)
{
    return atomic_load_explicit((const _Atomic(uint8_t) *)field, memory_order_relaxed);
}

static inline uint16_t vs_look16(const uint16_t *field)
{
    return atomic_load_explicit((const _Atomic(uint16_t) *)field, memory_order_relaxed);
}

static inline uint64_t vs_look64(const uint64_t *field)
{
    return atomic_load_explicit((const _Atomic(uint64_t) *)field, memory_order_relaxed);
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
