//! What debug builds watch of locks. In release builds all of it is empty.
//!
//! - A CPU that waits for a lock which it holds itself is stopped with a report, and does not spin for ever.
//! - The allocator's locks are taken in the order of [`Level`], and no two of a level together; see `held`.
//! - Where a lock is waited for too long, the report names the CPU that holds it.
//! - An NMI handler that would wait for a lock is reported, be it free or not.
//!
//! Only CPUs with a number below [`Platform::CPUS`](crate::platform::Platform::CPUS) can be told apart, so only they are
//! watched for the first two.
//!
//! These reports are the only panics with a lock held: there is no later moment for them.

#![forbid(unsafe_code)]

pub(super) use imp::{Holding, Watch};

/// The allocator's locks, in the order in which they may be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
#[cfg_attr(not(debug_assertions), allow(dead_code, reason = "nobody asks"))]
pub(crate) enum Level {
    /// The registry of caches.
    Registry = 1,
    /// The reclaim callbacks and the hook.
    Reclaim,
    /// A [`Reserve`](crate::Reserve).
    Reserve,
    /// An [`Arena`](crate::Arena).
    Arena,
    /// A cache's depot.
    Depot,
    /// A cache's slabs.
    Slabs,
    /// The freed objects that wait.
    Quarantine,
    /// The free places for guarded objects.
    Guard,
    /// The zones of page frames, from the lowest up.
    Zone0,
    /// The second.
    Zone1,
    /// The third.
    Zone2,
}

#[cfg(not(debug_assertions))]
mod imp {
    use core::marker::PhantomData;

    use super::Level;
    use crate::platform::Platform;
    use crate::sync::{SpinMutex, SpinMutexGuard};

    #[derive(Debug)]
    pub(crate) struct Watch;

    #[derive(Debug)]
    pub(crate) struct Holding<'a>(PhantomData<&'a Watch>);

    #[allow(clippy::extra_unused_type_parameters, reason = "debug builds ask the platform")]
    impl Watch {
        pub(crate) const fn named(_: &'static str) -> Self {
            Self
        }

        pub(crate) const fn ordered(_: Level) -> Self {
            Self
        }

        #[inline(always)]
        pub(crate) fn lock<'a, P: Platform, T>(&self, value: &'a SpinMutex<T>) -> SpinMutexGuard<'a, T> {
            value.lock()
        }

        #[inline(always)]
        pub(crate) fn hold<P: Platform>(&self) -> Holding<'_> {
            Holding(PhantomData)
        }
    }
}

#[cfg(debug_assertions)]
mod imp {
    use super::Level;
    use crate::lock::held;
    use crate::platform::{Platform, in_nmi};
    use crate::sync::{AtomicUsize, Ordering::Relaxed, SpinMutex, SpinMutexGuard, spin_loop};

    /// So often a lock may be found held: for a second, and for many under an emulator.
    #[cfg(not(test))]
    fn most_spins() -> u64 {
        1 << 24
    }

    #[cfg(test)]
    use crate::lock::tests::most_spins;

    /// What is known of a lock.
    #[derive(Debug)]
    pub(crate) struct Watch {
        name: &'static str,
        level: Option<Level>,
        /// The number of the CPU that holds it, plus 1; 0 where nobody does, or one that cannot be told apart.
        holder: AtomicUsize,
    }

    /// A CPU holds a lock until this is dropped.
    #[derive(Debug)]
    pub(crate) struct Holding<'a> {
        watch: &'a Watch,
        cpu: Option<usize>,
    }

    impl Watch {
        pub(crate) const fn named(name: &'static str) -> Self {
            Self { name, level: None, holder: AtomicUsize::new(0) }
        }

        pub(crate) const fn ordered(level: Level) -> Self {
            Self { name: level.name(), level: Some(level), holder: AtomicUsize::new(0) }
        }

        /// Takes the lock, or reports why it must not be waited for. Interrupts are off.
        #[track_caller]
        pub(crate) fn lock<'a, P: Platform, T>(&self, value: &'a SpinMutex<T>) -> SpinMutexGuard<'a, T> {
            let name = self.name;
            if in_nmi::<P>() {
                panic!("kslab: lock waited for in an NMI: {name}");
            }
            let cpu = watched::<P>();
            if let (Some(cpu), Some(level)) = (cpu, self.level)
                && self.holder() != Some(cpu)
                && let Some(held) = held::highest(cpu).filter(|&held| held >= level)
            {
                panic!("kslab: locks out of order on CPU {cpu}: {name}, with {} held", held.name());
            }
            for _ in 0..most_spins() {
                if let Some(guard) = value.try_lock() {
                    return guard;
                }
                if let (Some(cpu), Some(holder)) = (cpu, self.holder())
                    && cpu == holder
                {
                    panic!("kslab: lock taken twice on CPU {cpu}: {name}");
                }
                spin_loop();
            }
            match self.holder() {
                Some(holder) => panic!("kslab: lock held too long by CPU {holder}: {name}"),
                None => panic!("kslab: lock held too long: {name}"),
            }
        }

        /// To be called by whoever has taken it.
        pub(crate) fn hold<P: Platform>(&self) -> Holding<'_> {
            let cpu = watched::<P>();
            if let Some(cpu) = cpu {
                self.holder.store(cpu + 1, Relaxed);
                held::add(cpu, self.address(), self.level);
            }
            Holding { watch: self, cpu }
        }

        fn holder(&self) -> Option<usize> {
            self.holder.load(Relaxed).checked_sub(1)
        }

        fn address(&self) -> usize {
            core::ptr::from_ref(self).addr()
        }
    }

    impl Drop for Holding<'_> {
        fn drop(&mut self) {
            if let Some(cpu) = self.cpu {
                held::remove(cpu, self.watch.address());
                self.watch.holder.store(0, Relaxed);
            }
        }
    }

    /// The number of this CPU, where no other has it.
    fn watched<P: Platform>() -> Option<usize> {
        Some(P::current_cpu()).filter(|&cpu| cpu < P::CPUS)
    }

    impl Level {
        #[cfg(all(not(test), target_os = "none"))]
        pub(crate) const ALL: [Self; 11] = [
            Self::Registry,
            Self::Reclaim,
            Self::Reserve,
            Self::Arena,
            Self::Depot,
            Self::Slabs,
            Self::Quarantine,
            Self::Guard,
            Self::Zone0,
            Self::Zone1,
            Self::Zone2,
        ];

        const fn name(self) -> &'static str {
            match self {
                Self::Registry => "registry of caches",
                Self::Reclaim => "reclaim callbacks",
                Self::Reserve => "reserve",
                Self::Arena => "arena",
                Self::Depot => "depot",
                Self::Slabs => "slab list",
                Self::Quarantine => "quarantine",
                Self::Guard => "guarded objects",
                Self::Zone0 => "zone 0",
                Self::Zone1 => "zone 1",
                Self::Zone2 => "zone 2",
            }
        }
    }
}
