//! The functions that C calls, with the names of the originals.

/// Makes the functions that C calls, `malloc_create_zone` and the others, for [`Zones`](crate::systems::zones::Zones) that are a `static`.
///
/// ```ignore
/// static ZONES: Zones<'static, MyCpus> = Zones::new(&HEAP, print);
/// kslab::export_zones!(ZONES: MyCpus);
/// ```
#[macro_export]
macro_rules! export_zones {
    ($zones:path: $platform:ty) => {
        const _: () = {
            use ::core::ffi::{CStr, c_char, c_int, c_uint, c_void};
            use $crate::systems::zones::{Handle, Range, Statistics, Zones};

            #[unsafe(no_mangle)]
            extern "C" fn malloc_default_zone() -> Handle {
                $zones.default_zone()
            }
            #[unsafe(no_mangle)]
            extern "C" fn malloc_create_zone(start_size: usize, _flags: c_uint) -> Handle {
                $zones.create_zone(start_size)
            }
            #[unsafe(no_mangle)]
            unsafe extern "C" fn malloc_destroy_zone(zone: Handle) {
                // SAFETY: passed on to the caller, here and below.
                unsafe { $zones.destroy_zone(zone) }
            }
            #[unsafe(no_mangle)]
            extern "C" fn malloc_zone_register(zone: Handle) {
                $zones.zone_register(zone)
            }
            #[unsafe(no_mangle)]
            extern "C" fn malloc_zone_unregister(zone: Handle) {
                $zones.zone_unregister(zone)
            }
            #[unsafe(no_mangle)]
            unsafe extern "C" fn malloc_set_zone_name(zone: Handle, name: *const c_char) {
                // SAFETY: null or a string, says the caller.
                let name = (!name.is_null()).then(|| unsafe { CStr::from_ptr(name) });
                $zones.set_zone_name(zone, name)
            }
            #[unsafe(no_mangle)]
            extern "C" fn malloc_get_zone_name(zone: Handle) -> *const c_char {
                $zones.zone_name(zone).map_or(::core::ptr::null(), CStr::as_ptr)
            }
            #[unsafe(no_mangle)]
            extern "C" fn malloc_zone_malloc(zone: Handle, size: usize) -> *mut c_void {
                $zones.malloc(zone, size)
            }
            #[unsafe(no_mangle)]
            extern "C" fn malloc_zone_calloc(zone: Handle, count: usize, size: usize) -> *mut c_void {
                $zones.calloc(zone, count, size)
            }
            #[unsafe(no_mangle)]
            extern "C" fn malloc_zone_valloc(zone: Handle, size: usize) -> *mut c_void {
                $zones.valloc(zone, size)
            }
            #[unsafe(no_mangle)]
            extern "C" fn malloc_zone_memalign(zone: Handle, alignment: usize, size: usize) -> *mut c_void {
                $zones.memalign(zone, alignment, size)
            }
            #[unsafe(no_mangle)]
            unsafe extern "C" fn malloc_zone_free(zone: Handle, block: *mut c_void) {
                // SAFETY: as above.
                unsafe { $zones.free(zone, block) }
            }
            #[unsafe(no_mangle)]
            unsafe extern "C" fn malloc_zone_realloc(zone: Handle, block: *mut c_void, size: usize) -> *mut c_void {
                // SAFETY: as above.
                unsafe { $zones.realloc(zone, block, size) }
            }
            #[unsafe(no_mangle)]
            unsafe extern "C" fn malloc_zone_batch_malloc(
                zone: Handle,
                size: usize,
                results: *mut *mut c_void,
                count: c_uint,
            ) -> c_uint {
                if results.is_null() {
                    return 0;
                }
                // SAFETY: room for so many, says the caller.
                let results = unsafe { ::core::slice::from_raw_parts_mut(results, count as usize) };
                $zones.batch_malloc(zone, size, results) as c_uint
            }
            #[unsafe(no_mangle)]
            unsafe extern "C" fn malloc_zone_batch_free(zone: Handle, blocks: *mut *mut c_void, count: c_uint) {
                if !blocks.is_null() {
                    // SAFETY: so many, says the caller.
                    unsafe { $zones.batch_free(zone, ::core::slice::from_raw_parts(blocks, count as usize)) }
                }
            }
            #[unsafe(no_mangle)]
            extern "C" fn malloc_zone_from_ptr(block: *const c_void) -> Handle {
                $zones.zone_from_ptr(block)
            }
            #[unsafe(no_mangle)]
            extern "C" fn malloc_zone_size(zone: Handle, block: *const c_void) -> usize {
                $zones.size(zone, block)
            }
            #[unsafe(no_mangle)]
            extern "C" fn malloc_size(block: *const c_void) -> usize {
                $zones.size($zones.zone_from_ptr(block), block)
            }
            #[unsafe(no_mangle)]
            extern "C" fn malloc_good_size(size: usize) -> usize {
                Zones::<'static, $platform>::good_size(size)
            }
            #[unsafe(no_mangle)]
            extern "C" fn malloc_zone_check(zone: Handle) -> c_int {
                $zones.zone_check(zone).into()
            }
            #[unsafe(no_mangle)]
            unsafe extern "C" fn malloc_zone_statistics(zone: Handle, statistics: *mut Statistics) {
                // SAFETY: null, or the caller's own.
                if let Some(statistics) = unsafe { statistics.as_mut() } {
                    *statistics = $zones.zone_statistics(zone);
                }
            }
            #[unsafe(no_mangle)]
            extern "C" fn malloc_zone_pressure_relief(zone: Handle, goal: usize) -> usize {
                $zones.zone_pressure_relief(zone, goal)
            }
            #[unsafe(no_mangle)]
            extern "C" fn malloc_zone_enumerate(
                zone: Handle,
                context: *mut c_void,
                mask: c_uint,
                recorder: extern "C" fn(*mut c_void, c_uint, *const Range, c_uint),
            ) -> c_int {
                let record = |kind, ranges: &[Range]| recorder(context, kind, ranges.as_ptr(), ranges.len() as c_uint);
                $zones.enumerate(zone, mask, record).into()
            }
            #[unsafe(no_mangle)]
            extern "C" fn malloc_zone_print(zone: Handle, verbose: c_int) {
                $zones.print(zone, verbose != 0)
            }
            #[unsafe(no_mangle)]
            extern "C" fn malloc_zone_force_lock(zone: Handle) {
                $zones.force_lock(zone)
            }
            #[unsafe(no_mangle)]
            extern "C" fn malloc_zone_force_unlock(zone: Handle) {
                $zones.force_unlock(zone)
            }
            #[unsafe(no_mangle)]
            extern "C" fn malloc_zone_locked(zone: Handle) -> c_int {
                $zones.zone_locked(zone).into()
            }
        };
    };
}
