/* The calls of kslab's module `systems`, for C. Each group is there where a Rust crate makes it:
 *
 *   kslab::export_malloc!(C);               C's malloc
 *   kslab::export_windows_heaps!(WINDOWS);  Windows' heaps
 *   kslab::export_zones!(ZONES: Cpus);      macOS's zones
 *   kslab::export_pages!(PAGES);            BareMetal's pages
 *
 * What each call promises is in the documentation of the module.
 */
#ifndef KSLAB_H
#define KSLAB_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* C's malloc. A program with <malloc.h> has these from there, and defines KSLAB_WITHOUT_MALLOC. */
#ifndef KSLAB_WITHOUT_MALLOC

struct mallinfo2 {
    size_t arena, ordblks, smblks, hblks, hblkhd, usmblks, fsmblks, uordblks, fordblks, keepcost;
};

void *malloc(size_t size);
void free(void *block);
void *calloc(size_t count, size_t size);
void *realloc(void *block, size_t size);
void *reallocarray(void *block, size_t count, size_t size);
void *memalign(size_t alignment, size_t size);
void *aligned_alloc(size_t alignment, size_t size);
int posix_memalign(void **place, size_t alignment, size_t size);
void *valloc(size_t size);
void *pvalloc(size_t size);
size_t malloc_usable_size(void *block);
struct mallinfo2 mallinfo2(void);
int malloc_trim(size_t pad);

#endif

/* Windows' heaps. */
#ifndef KSLAB_WITHOUT_WINDOWS

typedef void *HANDLE;
typedef int BOOL;
typedef uint32_t DWORD;

#define HEAP_NO_SERIALIZE 0x01
#define HEAP_GENERATE_EXCEPTIONS 0x04
#define HEAP_ZERO_MEMORY 0x08
#define HEAP_REALLOC_IN_PLACE_ONLY 0x10

#define PROCESS_HEAP_ENTRY_BUSY 0x04

#define ERROR_INVALID_HANDLE 6
#define ERROR_NOT_ENOUGH_MEMORY 8
#define ERROR_INVALID_PARAMETER 87
#define ERROR_NO_MORE_ITEMS 259

#define STATUS_ACCESS_VIOLATION 0xC0000005
#define STATUS_NO_MEMORY 0xC0000017

typedef struct {
    void *lpData;
    DWORD cbData;
    uint8_t cbOverhead;
    uint8_t iRegionIndex;
    uint16_t wFlags;
    union {
        struct {
            HANDLE hMem;
            DWORD dwReserved[3];
        } Block;
        struct {
            DWORD dwCommittedSize;
            DWORD dwUnCommittedSize;
            void *lpFirstBlock;
            void *lpLastBlock;
        } Region;
    };
} PROCESS_HEAP_ENTRY;

HANDLE HeapCreate(DWORD options, size_t initial, size_t maximum);
BOOL HeapDestroy(HANDLE heap);
HANDLE GetProcessHeap(void);
void *HeapAlloc(HANDLE heap, DWORD flags, size_t bytes);
void *HeapReAlloc(HANDLE heap, DWORD flags, void *block, size_t bytes);
BOOL HeapFree(HANDLE heap, DWORD flags, void *block);
size_t HeapSize(HANDLE heap, DWORD flags, const void *block);
BOOL HeapValidate(HANDLE heap, DWORD flags, const void *block);
BOOL HeapWalk(HANDLE heap, PROCESS_HEAP_ENTRY *entry);

#endif

/* macOS's zones. */
#ifndef KSLAB_WITHOUT_ZONES

typedef struct kslab_zone malloc_zone_t;

typedef struct {
    unsigned blocks_in_use;
    size_t size_in_use;
    size_t max_size_in_use;
    size_t size_allocated;
} malloc_statistics_t;

typedef struct {
    uintptr_t address;
    size_t size;
} vm_range_t;

#define MALLOC_PTR_IN_USE_RANGE_TYPE 1
#define MALLOC_PTR_REGION_RANGE_TYPE 2
#define MALLOC_ADMIN_REGION_RANGE_TYPE 4

typedef void kslab_range_recorder(void *context, unsigned type, const vm_range_t *ranges, unsigned count);

malloc_zone_t *malloc_default_zone(void);
malloc_zone_t *malloc_create_zone(size_t start_size, unsigned flags);
void malloc_destroy_zone(malloc_zone_t *zone);
void malloc_zone_register(malloc_zone_t *zone);
void malloc_zone_unregister(malloc_zone_t *zone);
void malloc_set_zone_name(malloc_zone_t *zone, const char *name);
const char *malloc_get_zone_name(malloc_zone_t *zone);
void *malloc_zone_malloc(malloc_zone_t *zone, size_t size);
void *malloc_zone_calloc(malloc_zone_t *zone, size_t count, size_t size);
void *malloc_zone_valloc(malloc_zone_t *zone, size_t size);
void *malloc_zone_memalign(malloc_zone_t *zone, size_t alignment, size_t size);
void malloc_zone_free(malloc_zone_t *zone, void *block);
void *malloc_zone_realloc(malloc_zone_t *zone, void *block, size_t size);
unsigned malloc_zone_batch_malloc(malloc_zone_t *zone, size_t size, void **results, unsigned count);
void malloc_zone_batch_free(malloc_zone_t *zone, void **blocks, unsigned count);
malloc_zone_t *malloc_zone_from_ptr(const void *block);
size_t malloc_size(const void *block);
size_t malloc_good_size(size_t size);
int malloc_zone_check(malloc_zone_t *zone);
void malloc_zone_statistics(malloc_zone_t *zone, malloc_statistics_t *statistics);
size_t malloc_zone_pressure_relief(malloc_zone_t *zone, size_t goal);
void malloc_zone_print(malloc_zone_t *zone, int verbose);

/* What the original reaches by a zone's table of functions. */
size_t malloc_zone_size(malloc_zone_t *zone, const void *block);
int malloc_zone_enumerate(malloc_zone_t *zone, void *context, unsigned mask, kslab_range_recorder *recorder);
void malloc_zone_force_lock(malloc_zone_t *zone);
void malloc_zone_force_unlock(malloc_zone_t *zone);
int malloc_zone_locked(malloc_zone_t *zone);

#endif

/* BareMetal's pages of 2 MiB. */
#ifndef KSLAB_WITHOUT_PAGES

void *os_mem_allocate(size_t pages);
size_t os_mem_release(void *address, size_t pages);
size_t os_mem_get_free(void);

#endif

#ifdef __cplusplus
}
#endif

#endif
