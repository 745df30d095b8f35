/* Threads that allocate, exchange blocks, exit and fork at once. It ends with "ok" and 0, or says what is wrong. */
#include <errno.h>
#include <malloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(condition)                                                        \
    do {                                                                        \
        if (!(condition)) {                                                     \
            fprintf(stderr, "line %d: not so: %s\n", __LINE__, #condition);     \
            _exit(1);                                                           \
        }                                                                       \
    } while (0)

enum { SLOTS = 1024, WORKERS = 8, GENERATIONS = 20, STEPS = 20000, FORKS = 100, MANY = 100 };

/* Blocks that threads hand to each other; the first word of each is its size. */
static _Atomic(size_t *) exchange[SLOTS];
static pthread_key_t key;

static uint64_t next(uint64_t *random) {
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    return *random;
}

static size_t size_of(uint64_t random) {
    size_t sizes[] = {16, 64, 200, 1000, 5000, 9000, 70000, 300000};
    size_t most = sizes[random % 8 < 6 ? random % 5 : random % 8];
    return 16 + (random >> 8) % most;
}

static void check(size_t *block) {
    size_t size = block[0];
    CHECK(malloc_usable_size(block) >= size);
    CHECK(((unsigned char *)block)[size - 1] == (unsigned char)size);
}

static size_t *make(size_t size) {
    size_t *block = malloc(size);
    CHECK(block != NULL && (uintptr_t)block % 16 == 0);
    ((unsigned char *)block)[size - 1] = (unsigned char)size;
    block[0] = size;
    return block;
}

static void step(uint64_t *random) {
    uint64_t now = next(random);
    size_t *block = make(size_of(now));
    if (now % 16 == 0) {
        size_t size = size_of(next(random));
        check(block);
        block = realloc(block, size);
        CHECK(block != NULL);
        ((unsigned char *)block)[size - 1] = (unsigned char)size;
        block[0] = size;
    }
    block = atomic_exchange(&exchange[(now >> 32) % SLOTS], block);
    if (block != NULL) {
        check(block);
        free(block);
    }
}

/* Runs when the thread is about to exit, after the allocator has taken its number, perhaps. */
static void at_exit(void *value) {
    free(value);
    free(malloc(100));
}

static void *work(void *seed) {
    uint64_t random = (uintptr_t)seed * 0x9e3779b97f4a7c15;
    pthread_setspecific(key, malloc(50));
    for (int i = 0; i < STEPS; i++)
        step(&random);
    return make(48);
}

static void *generations(void *seed) {
    for (uintptr_t i = 0; i < GENERATIONS; i++) {
        pthread_t thread;
        void *result;
        CHECK(pthread_create(&thread, NULL, work, (void *)((uintptr_t)seed * 1000 + i + 1)) == 0);
        CHECK(pthread_join(thread, &result) == 0);
        check(result);
        free(result);
    }
    return NULL;
}

static void *forks(void *unused) {
    for (uintptr_t i = 1; i <= FORKS; i++) {
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            /* The other threads are no more, but what they had is usable, and so are new threads. */
            uint64_t random = i;
            for (int j = 0; j < 2000; j++)
                step(&random);
            pthread_t thread;
            void *result;
            if (i % 10 == 0) {
                CHECK(pthread_create(&thread, NULL, work, (void *)(i + 77)) == 0);
                CHECK(pthread_join(thread, &result) == 0);
                free(result);
            }
            _exit(42);
        }
        int status;
        CHECK(waitpid(child, &status, 0) == child);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 42);
        free(make(300));
    }
    return unused;
}

static void *idle(void *barrier) {
    void *block = malloc(1000);
    pthread_barrier_wait(barrier);
    free(block);
    return malloc(10);
}

/* More threads than there are numbers. */
static void many(void) {
    pthread_barrier_t barrier;
    pthread_t threads[MANY];
    CHECK(pthread_barrier_init(&barrier, NULL, MANY) == 0);
    for (int i = 0; i < MANY; i++)
        CHECK(pthread_create(&threads[i], NULL, idle, &barrier) == 0);
    for (int i = 0; i < MANY; i++) {
        void *result;
        CHECK(pthread_join(threads[i], &result) == 0);
        free(result);
    }
}

static volatile sig_atomic_t signals;

/* Not allowed in C, but programs do it. */
static void on_signal(int number) {
    (void)number;
    char *block = malloc(100);
    if (block != NULL)
        block[0] = 1;
    free(block);
    signals++;
}

static void in_signals(void) {
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    struct itimerval often = {{0, 200}, {0, 200}}, never = {{0, 0}, {0, 0}};
    sigaction(SIGALRM, &action, NULL);
    setitimer(ITIMER_REAL, &often, NULL);
    uint64_t random = 99;
    for (int i = 0; signals < 200; i++)
        step(&random);
    setitimer(ITIMER_REAL, &never, NULL);
}

/* Pages that the process has in memory. */
static long resident(void) {
    long all, here;
    FILE *file = fopen("/proc/self/statm", "r");
    CHECK(file != NULL && fscanf(file, "%ld %ld", &all, &here) == 2 && fclose(file) == 0);
    return here;
}

/* malloc_trim says 1 only where memory went back to the system. The C library says it more often. */
static void trims(void) {
    enum { SIZE = 24 << 20, PAGES = SIZE / 4096 };
    malloc_trim(0);
    CHECK(malloc_trim(0) == 0);
    for (int i = 0; i < 3; i++) {
        char *volatile block = malloc(SIZE);
        memset(block, 1, SIZE);
        free(block);
        long before = resident();
        CHECK(malloc_trim((size_t)1 << 40) == 0 && resident() > before - PAGES / 8);
        CHECK(malloc_trim(0) == 1 && resident() < before - PAGES * 3 / 4);
        CHECK(malloc_trim(0) == 0);
    }
}

static void calls(void) {
    void *place = (void *)1;
    errno = 0;
    CHECK(posix_memalign(&place, 3, 8) == EINVAL && place == (void *)1 && errno == 0);
    CHECK(posix_memalign(&place, 4096, 100) == 0 && (uintptr_t)place % 4096 == 0);
    free(place);
    volatile size_t half = (size_t)1 << 33;
    CHECK(calloc(half, half) == NULL && errno == ENOMEM);
    void *volatile huge = malloc((size_t)3 << 30);
    CHECK(huge != NULL && malloc_usable_size(huge) >= (size_t)3 << 30);
    ((char *)huge)[((size_t)3 << 30) - 1] = 1;
    memcpy(huge, "kept", 5);
    huge = realloc(huge, 100);
    CHECK(strcmp(huge, "kept") == 0);
    free(huge);
    char *block = calloc(1000, 1000);
    for (int i = 0; i < 1000000; i++)
        CHECK(block[i] == 0);
    memset(block, 7, 1000000);
    free(block);
    block = calloc(1000, 1000);
    for (int i = 0; i < 1000000; i++)
        CHECK(block[i] == 0);
    free(block);
    struct mallinfo2 info = mallinfo2();
    CHECK(info.uordblks + info.fordblks == info.arena && info.arena > 0);
    CHECK(malloc_trim(0) >= 0);
}

int main(void) {
    CHECK(pthread_key_create(&key, at_exit) == 0);
    if (getenv("WITH_SIGNALS") != NULL)
        trims();
    calls();
    many();
    pthread_t threads[WORKERS], forker;
    for (uintptr_t i = 0; i < WORKERS; i++)
        CHECK(pthread_create(&threads[i], NULL, generations, (void *)(i + 1)) == 0);
    CHECK(pthread_create(&forker, NULL, forks, NULL) == 0);
    for (int i = 0; i < WORKERS; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK(pthread_join(forker, NULL) == 0);
    for (int i = 0; i < SLOTS; i++)
        free(exchange[i]);
    memset(exchange, 0, sizeof exchange);
    if (getenv("WITH_SIGNALS") != NULL)
        in_signals();
    puts("ok");
    return 0;
}
