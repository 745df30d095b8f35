/* Every call of kslab.h once or more, as C sees it. It ends with "ok" and 0, or says what is wrong. */
#include "../../include/kslab.h"

#include <stdio.h>
#include <string.h>

int test_errno(void);
DWORD test_last_error(void);
DWORD test_exception(void);

static int failures;

#define CHECK(condition)                                                 \
    do {                                                                 \
        if (!(condition)) {                                              \
            printf("line %d: not so: %s\n", __LINE__, #condition);       \
            failures++;                                                  \
        }                                                                \
    } while (0)

#define ALIGNED(block, alignment) ((block) != NULL && (uintptr_t)(block) % (alignment) == 0)

static void c_malloc(void) {
    char *block = malloc(100);
    CHECK(ALIGNED(block, 16) && malloc_usable_size(block) >= 100);
    strcpy(block, "kept");
    block = realloc(block, 5000);
    CHECK(strcmp(block, "kept") == 0);
    block = reallocarray(block, 10, 10);
    CHECK(strcmp(block, "kept") == 0);
    CHECK(realloc(block, 0) == NULL);
    void *zero = calloc(10, 10);
    CHECK(zero != NULL && ((char *)zero)[99] == 0);
    free(zero);
    free(NULL);
    volatile size_t large = (size_t)1 << 40;
    CHECK(malloc(large) == NULL && test_errno() == 12);
    void *places[6] = {memalign(64, 10), aligned_alloc(256, 10), valloc(10), pvalloc(10), NULL, malloc(0)};
    CHECK(posix_memalign(&places[4], 1024, 10) == 0 && posix_memalign(NULL, 3, 10) == 22);
    CHECK(ALIGNED(places[0], 64) && ALIGNED(places[1], 256) && ALIGNED(places[2], 4096));
    CHECK(ALIGNED(places[3], 4096) && ALIGNED(places[4], 1024) && places[5] != NULL);
    struct mallinfo2 info = mallinfo2();
    CHECK(info.uordblks + info.fordblks == info.arena && info.arena > 0 && info.usmblks == 0);
    for (int i = 0; i < 6; i++)
        free(places[i]);
    malloc_trim(0);
    CHECK(malloc_trim(0) == 0);
}

static void windows_heaps(void) {
    HANDLE heap = HeapCreate(HEAP_NO_SERIALIZE, 0, 1 << 20);
    char *block = HeapAlloc(heap, HEAP_ZERO_MEMORY, 100);
    CHECK(block != NULL && block[99] == 0 && HeapSize(heap, 0, block) == 100);
    block = HeapReAlloc(heap, HEAP_ZERO_MEMORY, block, 3000);
    CHECK(block != NULL && block[2999] == 0 && HeapSize(heap, 0, block) == 3000);
    CHECK(HeapReAlloc(heap, HEAP_REALLOC_IN_PLACE_ONLY, block, 9000) == NULL);
    CHECK(HeapAlloc(heap, HEAP_GENERATE_EXCEPTIONS, 0x7FFF8) == NULL && test_exception() == STATUS_NO_MEMORY);
    CHECK(HeapValidate(heap, 0, block) && HeapValidate(heap, 0, NULL));
    PROCESS_HEAP_ENTRY entry = {.lpData = NULL};
    CHECK(HeapWalk(heap, &entry) && entry.lpData == block && entry.cbData == 3000);
    CHECK(entry.wFlags == PROCESS_HEAP_ENTRY_BUSY && entry.cbOverhead == 72 && entry.iRegionIndex == 0);
    CHECK(!HeapWalk(heap, &entry) && test_last_error() == ERROR_NO_MORE_ITEMS);
    CHECK(HeapFree(heap, 0, block) && !HeapFree(heap, 0, block) && test_last_error() == ERROR_INVALID_PARAMETER);
    CHECK(HeapSize(heap, 0, block) == (size_t)-1);
    CHECK(HeapDestroy(heap) && !HeapDestroy(heap) && test_last_error() == ERROR_INVALID_HANDLE);
    CHECK(GetProcessHeap() != NULL && GetProcessHeap() == GetProcessHeap());
    CHECK(!HeapDestroy(GetProcessHeap()) && test_last_error() == ERROR_INVALID_HANDLE);
    CHECK(HeapCreate(0, 2 << 20, 1 << 20) == NULL && test_last_error() == ERROR_INVALID_PARAMETER);
    CHECK(HeapCreate(0, (size_t)1 << 40, 0) == NULL && test_last_error() == ERROR_NOT_ENOUGH_MEMORY);
}

struct found {
    size_t blocks, bytes, kinds;
};

static void record(void *context, unsigned type, const vm_range_t *ranges, unsigned count) {
    struct found *found = context;
    found->kinds |= type;
    for (unsigned i = 0; i < count; i++) {
        found->blocks += type == MALLOC_PTR_IN_USE_RANGE_TYPE;
        found->bytes += type == MALLOC_PTR_IN_USE_RANGE_TYPE ? 0 : ranges[i].size;
    }
}

static void zones(void) {
    malloc_zone_t *zone = malloc_create_zone(0, 0);
    malloc_set_zone_name(zone, "pictures");
    CHECK(strcmp(malloc_get_zone_name(zone), "pictures") == 0);
    char *blocks[4] = {malloc_zone_malloc(zone, 100), malloc_zone_calloc(zone, 10, 10), malloc_zone_valloc(zone, 10),
                       malloc_zone_memalign(zone, 512, 10)};
    CHECK(blocks[0] != NULL && blocks[1][99] == 0 && ALIGNED(blocks[2], 4096) && ALIGNED(blocks[3], 512));
    strcpy(blocks[0], "kept");
    blocks[0] = malloc_zone_realloc(zone, blocks[0], 1000);
    CHECK(strcmp(blocks[0], "kept") == 0);
    CHECK(malloc_zone_from_ptr(blocks[0]) == zone && malloc_zone_from_ptr(&zone) == NULL);
    CHECK(malloc_size(blocks[0]) == malloc_good_size(1000) && malloc_zone_size(zone, blocks[0]) == 1024);
    CHECK(malloc_zone_size(malloc_default_zone(), blocks[0]) == 0);
    CHECK(malloc_zone_check(zone) && malloc_zone_check(NULL));
    malloc_statistics_t statistics;
    malloc_zone_statistics(zone, &statistics);
    CHECK(statistics.blocks_in_use == 4 && statistics.size_in_use <= statistics.max_size_in_use);
    struct found found = {0, 0, 0};
    malloc_zone_force_lock(zone);
    CHECK(malloc_zone_locked(zone) && malloc_zone_enumerate(zone, &found, 7, record));
    malloc_zone_force_unlock(zone);
    CHECK(found.blocks == 4 && (found.kinds & 3) == 3 && found.bytes == statistics.size_allocated);
    void *many[8];
    CHECK(malloc_zone_batch_malloc(zone, 48, many, 8) == 8);
    malloc_zone_batch_free(zone, many, 8);
    malloc_zone_unregister(zone);
    CHECK(malloc_zone_from_ptr(blocks[0]) == NULL);
    malloc_zone_register(zone);
    malloc_zone_print(zone, 0);
    malloc_zone_free(zone, blocks[0]);
    malloc_zone_free(zone, NULL);
    CHECK(malloc_zone_pressure_relief(zone, 0) > 0 && malloc_zone_pressure_relief(NULL, 0) == 0);
    malloc_destroy_zone(zone);
    CHECK(malloc_zone_from_ptr(blocks[1]) == NULL);
}

static void pages(void) {
    size_t before = os_mem_get_free();
    char *two = os_mem_allocate(2);
    CHECK(ALIGNED(two, 2 << 20) && os_mem_get_free() == before - 2);
    two[(4 << 20) - 1] = 1;
    CHECK(os_mem_allocate(0) == NULL && os_mem_allocate(100) == NULL);
    CHECK(os_mem_release(two + 4096, 1) == 0 && os_mem_release(two, 3) == 0);
    CHECK(os_mem_release(two, 2) == 2 && os_mem_release(two, 2) == 0 && os_mem_get_free() == before);
}

int main(void) {
    pages();
    c_malloc();
    windows_heaps();
    zones();
    puts(failures == 0 ? "ok" : "failed");
    return failures != 0;
}
