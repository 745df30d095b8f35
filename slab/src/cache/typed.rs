//! Caches of typed objects that keep their state while they are free.

use core::alloc::Layout;
use core::fmt;
use core::marker::PhantomData;
use core::mem::ManuallyDrop;
use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;

use super::public::{Cache, InUse};
use super::shared::Caches;
use super::{AllocError, InitFailed, Reserve};
use crate::fault::Fault;
use crate::platform::Platform;
use crate::stats::CacheStats;

/// What a cache keeps constructed.
///
/// An object enters the cache by [`init`](Self::init) and leaves it by being dropped: seldom. In between it is used many
/// times: [`renew`](Self::renew) at each allocation, [`recycle`](Self::recycle) at each free. So what is costly to set up
/// and is the same after each use (locks, lists, buffers) is set up once.
///
/// It borrows nothing, since a cache with objects still allocated is never ended, and keeps those that are free
/// constructed.
pub trait Object: Sized + Send + 'static {
    /// Makes an object, when memory for it enters the cache.
    ///
    /// # Errors
    ///
    /// [`InitFailed`] makes the allocation fail with [`AllocError::ConstructorFailed`].
    fn init() -> Result<Self, InitFailed>;

    /// Called when the object is allocated.
    fn renew(&mut self) {}

    /// Called when the object is freed; it must be fit for its next use afterwards. One whose `recycle` panics stays
    /// allocated.
    fn recycle(&mut self) {}

    /// Whether it is fit for its next use: asked after [`recycle`](Self::recycle) in debug builds, and in caches with checks.
    /// One that is not is a fault: see [`Fault::NotConstructed`](crate::fault::Fault::NotConstructed).
    fn is_constructed(&self) -> bool {
        true
    }
}

/// A cache of objects of type `T`; for a `static` too.
///
/// ```
/// # use kslab::platform::NoInterrupts;
/// use kslab::{Heap, InitFailed, Object, ObjectCache};
///
/// struct Request {
///     buffer: [u8; 512],
///     length: usize,
/// }
///
/// impl Object for Request {
///     fn init() -> Result<Self, InitFailed> {
///         Ok(Self { buffer: [0; 512], length: 0 })
///     }
///
///     fn recycle(&mut self) {
///         self.length = 0;
///     }
/// }
///
/// static HEAP: Heap<NoInterrupts> = Heap::new();
/// static REQUESTS: ObjectCache<Request, NoInterrupts> = ObjectCache::new(HEAP.caches(), "request");
/// # let mut memory = vec![0_u64; 64 * 512];
/// # // SAFETY: the buffer is nobody else's, and lives until the end.
/// # unsafe { HEAP.init_range(memory.as_mut_ptr().cast(), memory.len() * 8) }.unwrap();
///
/// let mut request = REQUESTS.allocate()?;
/// request.buffer[..2].copy_from_slice(b"hi");
/// request.length = 2;
/// drop(request); // goes back to the cache, constructed
/// assert_eq!(REQUESTS.allocate()?.length, 0);
/// # Ok::<(), kslab::AllocError>(())
/// ```
pub struct ObjectCache<'a, T, P: Platform> {
    cache: Cache<'a, P>,
    objects: PhantomData<fn() -> T>,
}

impl<'a, T: Object, P: Platform> ObjectCache<'a, T, P> {
    /// A cache of objects of `T` from the memory of `caches`, which tables call `name`.
    pub const fn new(caches: &'a Caches<P>, name: &'static str) -> Self {
        let cache = Cache::new(caches, name, Layout::new::<T>());
        // SAFETY: `init` writes a `T` to memory of its layout, and only its drop undoes it; users have it as a `T`.
        Self { cache: unsafe { cache.with_constructor(init::<T>, fini::<T>) }, objects: PhantomData }
    }

    /// As [`Cache::with_limit`].
    #[must_use]
    pub const fn with_limit(mut self, objects: usize) -> Self {
        self.cache.limit(objects);
        self
    }

    /// As [`Cache::cache_line_aligned`].
    #[must_use]
    pub const fn cache_line_aligned(mut self) -> Self {
        self.cache.align_to_cache_line();
        self
    }

    /// An object, which goes back to the cache when it is dropped.
    ///
    /// # Errors
    ///
    /// As [`Cache::allocate`].
    #[inline]
    pub fn allocate(&self) -> Result<ObjectBox<'_, T, P>, AllocError> {
        self.cache.allocate().map(|object| self.own(object))
    }

    /// As [`Cache::allocate_without_growing`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn allocate_without_growing(&self) -> Result<ObjectBox<'_, T, P>, AllocError> {
        self.cache.allocate_without_growing().map(|object| self.own(object))
    }

    fn own(&self, object: NonNull<u8>) -> ObjectBox<'_, T, P> {
        let mut object = ObjectBox { object: object.cast::<T>(), cache: &self.cache, owns: PhantomData };
        object.renew();
        object
    }

    /// The object that [`ObjectBox::into_raw`] has let go.
    ///
    /// # Safety
    ///
    /// It came from this cache, and there is no other box for it.
    pub unsafe fn from_raw(&self, object: NonNull<T>) -> ObjectBox<'_, T, P> {
        ObjectBox { object, cache: &self.cache, owns: PhantomData }
    }

    /// As [`Cache::reserve`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn reserve(&self, objects: usize) -> Result<Reserve<'_, P>, AllocError> {
        self.cache.reserve(objects)
    }

    /// As [`Cache::shrink`].
    pub fn shrink(&self) -> usize {
        self.cache.shrink()
    }

    /// As [`Cache::injector`].
    ///
    /// # Errors
    ///
    /// As there.
    #[cfg(feature = "fault-injection")]
    pub fn injector(&self) -> Result<&crate::Injector, AllocError> {
        self.cache.injector()
    }

    /// As [`Cache::stats`].
    pub fn stats(&self) -> Option<CacheStats> {
        self.cache.stats()
    }

    /// As [`Cache::destroy`].
    ///
    /// # Errors
    ///
    /// As there; objects that [`ObjectBox::into_raw`] or `mem::forget` let go are still allocated.
    pub fn destroy(self) -> Result<(), InUse<'a, P>> {
        self.cache.destroy()
    }
}

/// # Safety
///
/// `object` points to memory for a `T`.
unsafe fn init<T: Object>(object: *mut u8) -> Result<(), InitFailed> {
    let value = T::init()?;
    // SAFETY: passed on to the caller.
    unsafe { object.cast::<T>().write(value) };
    Ok(())
}

/// # Safety
///
/// `object` points to a `T` that nobody uses again.
unsafe fn fini<T>(object: *mut u8) {
    // SAFETY: passed on to the caller.
    unsafe { object.cast::<T>().drop_in_place() };
}

/// An allocated object of an [`ObjectCache`]; dropping it frees the object.
pub struct ObjectBox<'c, T: Object, P: Platform> {
    object: NonNull<T>,
    cache: &'c Cache<'c, P>,
    owns: PhantomData<T>,
}

impl<T: Object, P: Platform> ObjectBox<'_, T, P> {
    /// Lets the object go; [`ObjectCache::from_raw`] owns it again.
    pub fn into_raw(self) -> NonNull<T> {
        ManuallyDrop::new(self).object
    }
}

impl<T: Object, P: Platform> Deref for ObjectBox<'_, T, P> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: constructed by the cache, and ours until dropped.
        unsafe { self.object.as_ref() }
    }
}

impl<T: Object, P: Platform> DerefMut for ObjectBox<'_, T, P> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above.
        unsafe { self.object.as_mut() }
    }
}

impl<T: Object, P: Platform> Drop for ObjectBox<'_, T, P> {
    fn drop(&mut self) {
        self.recycle();
        if self.cache.asks_objects() && !self.is_constructed() {
            return self.cache.keep_out(self.object.cast(), Fault::NotConstructed);
        }
        // SAFETY: it came from this cache, is still constructed, and nobody has it after this.
        unsafe { self.cache.free_for(self.object.cast(), None) };
    }
}

// SAFETY: the box owns the object, which may move to another thread; a cache takes it back on any CPU.
unsafe impl<T: Object, P: Platform> Send for ObjectBox<'_, T, P> {}
// SAFETY: a shared box gives out shared references only.
unsafe impl<T: Object + Sync, P: Platform> Sync for ObjectBox<'_, T, P> {}

impl<T: Object + fmt::Debug, P: Platform> fmt::Debug for ObjectBox<'_, T, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

impl<T, P: Platform> fmt::Debug for ObjectCache<'_, T, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.cache, f)
    }
}
