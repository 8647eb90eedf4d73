/* What Cython cannot say about memory that several processes share: a lock that outlives its holder, the order of
 * stores, and where a test may kill the process.
 *
 * Order: what a killed process leaves behind is what it stored, in the order of its program, so that the journal
 * asks for no more than a compiler that keeps that order (tg_in_order). Readers without the lock run beside a
 * living writer, on another processor: they ask for tg_stores_done and tg_loads_done.
 */
#ifndef TOKENGUARD_REGION_H
#define TOKENGUARD_REGION_H

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>

typedef __int128 tg_wide; /* holds any product of two int64 */

static const int64_t tg_ticks_us[8] = {0, 1, 10, 100, 1000, 10000, 100000, 1000000};

#define tg_in_order() __atomic_signal_fence(__ATOMIC_SEQ_CST)
#define tg_stores_done() __atomic_thread_fence(__ATOMIC_RELEASE)
#define tg_loads_done() __atomic_thread_fence(__ATOMIC_ACQUIRE)
#define tg_load(at) __atomic_load_n(at, __ATOMIC_ACQUIRE)
#define tg_store(at, value) __atomic_store_n(at, value, __ATOMIC_RELEASE)
#define tg_add(at, value) __atomic_fetch_add(at, value, __ATOMIC_RELAXED)

static inline int64_t tg_now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static inline int64_t tg_steady_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static inline void tg_pause(void) {
    for (int i = 0; i < 4; i++) {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ volatile("yield");
#endif
    }
}

/* --- a lock that outlives its holder ---------------------------------------------------------------------------
 *
 * tg_lock_try and tg_lock_wait return 0; EOWNERDEAD: the lock is ours, and its last holder died with it, so that what
 * it guards must be mended, and tg_lock_mended called, before it is given back; or EBUSY or ETIMEDOUT: it is not ours.
 *
 * Linux has robust mutexes for that: the kernel passes on what a dead thread held. Where there are none (macOS), the
 * lock is a word that holds its holder's process id, and who has waited for a while asks whether that process lives.
 * NOTE: there, a process id that was given to somebody else in between leaves the lock held, and so does a dead holder
 * that its parent has not waited for yet: every wait times out.
 */

#if defined(__APPLE__) || defined(TOKENGUARD_PID_LOCK)

typedef struct {
    _Alignas(64) pid_t holder; /* 0: nobody */
} tg_lock;

static inline int tg_lock_init(tg_lock *lock) {
    tg_store(&lock->holder, 0);
    return 0;
}

static inline int tg_lock_try(tg_lock *lock) {
    pid_t nobody = 0;
    return __atomic_compare_exchange_n(&lock->holder, &nobody, getpid(), 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)
               ? 0 : EBUSY;
}

static inline int tg_lock_wait(tg_lock *lock, int64_t wait_us) {
    const struct timespec step = {0, 50000};
    const int64_t until_us = tg_steady_us() + wait_us;
    while (tg_steady_us() < until_us) {
        if (!tg_lock_try(lock))
            return 0;
        pid_t holder = tg_load(&lock->holder);
        if (holder && kill(holder, 0) && errno == ESRCH
            && __atomic_compare_exchange_n(&lock->holder, &holder, getpid(), 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
            return EOWNERDEAD;
        nanosleep(&step, NULL);
    }
    return ETIMEDOUT;
}

static inline void tg_lock_mended(tg_lock *lock) { (void)lock; }

static inline void tg_lock_give(tg_lock *lock) { tg_store(&lock->holder, 0); }

#else

typedef struct {
    _Alignas(64) pthread_mutex_t mutex;
} tg_lock;

static inline int tg_lock_init(tg_lock *lock) {
    pthread_mutexattr_t attributes;
    int failed = pthread_mutexattr_init(&attributes)
        || pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED)
        || pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST)
        || pthread_mutex_init(&lock->mutex, &attributes);
    pthread_mutexattr_destroy(&attributes);
    return failed;
}

static inline int tg_lock_try(tg_lock *lock) { return pthread_mutex_trylock(&lock->mutex); }

static inline int tg_lock_wait(tg_lock *lock, int64_t wait_us) {
    struct timespec until;
#if defined(__GLIBC__) && __GLIBC_PREREQ(2, 30)
    const clockid_t clock = CLOCK_MONOTONIC; /* a wait should not depend on who sets the clock */
#else
    const clockid_t clock = CLOCK_REALTIME;
#endif
    clock_gettime(clock, &until);
    until.tv_sec += wait_us / 1000000;
    until.tv_nsec += wait_us % 1000000 * 1000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec += 1;
        until.tv_nsec -= 1000000000;
    }
#if defined(__GLIBC__) && __GLIBC_PREREQ(2, 30)
    return pthread_mutex_clocklock(&lock->mutex, clock, &until);
#else
    return pthread_mutex_timedlock(&lock->mutex, &until);
#endif
}

static inline void tg_lock_mended(tg_lock *lock) { pthread_mutex_consistent(&lock->mutex); }

static inline void tg_lock_give(tg_lock *lock) { pthread_mutex_unlock(&lock->mutex); }

#endif

/* --- for tests -------------------------------------------------------------------------------------------------
 *
 * A build with TOKENGUARD_TEST_BUILD dies at the tg_point that tg_points counts down to, and tells a thread which turn
 * its last operation had and at what time. Nothing of it is in a build without.
 */

#ifdef TOKENGUARD_TEST_BUILD

__attribute__((visibility("default"))) int64_t tg_points = 0;
static __thread int64_t tg_last_turn, tg_last_now_us;

static inline void tg_point(void) {
    if (tg_points && !--tg_points)
        kill(getpid(), SIGKILL);
}

static inline void tg_witness(uint64_t turn, int64_t now_us) {
    tg_last_turn = (int64_t)turn;
    tg_last_now_us = now_us;
}

__attribute__((visibility("default"))) int64_t tg_witness_turn(void) { return tg_last_turn; }
__attribute__((visibility("default"))) int64_t tg_witness_now_us(void) { return tg_last_now_us; }

#else

static inline void tg_point(void) {}

static inline void tg_witness(uint64_t turn, int64_t now_us) {
    (void)turn;
    (void)now_us;
}

#endif

#endif
