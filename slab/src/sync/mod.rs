//! What CPUs share without a lock, and the lock itself: every atomic of this crate comes from here.
//!
//! So the code that is shipped can also run where every order of the CPUs' steps is tried: with `--cfg models` the tests
//! of [`models`](crate::models) have it on atomics of another make, which take part in that.

#[cfg(all(test, models))]
pub(crate) mod explorer;
#[cfg(all(test, models))]
mod modelled;

#[cfg(all(test, models))]
pub(crate) use modelled::{
    AtomicBool, AtomicPtr, AtomicU8, AtomicU16, AtomicU32, AtomicU64, AtomicUsize, Counter, Once, SpinMutex,
    SpinMutexGuard, spin_loop,
};

#[cfg(not(all(test, models)))]
pub(crate) use core::hint::spin_loop;
pub(crate) use core::sync::atomic::Ordering;
#[cfg(not(all(test, models)))]
pub(crate) use core::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicU8, AtomicU16, AtomicU32, AtomicU64, AtomicU64 as Counter, AtomicUsize,
};

#[cfg(not(all(test, models)))]
pub(crate) use spin::{
    Once,
    mutex::{SpinMutex, SpinMutexGuard},
};

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    /// Files under `folder`, this one's left out, that name atomics or spin locks of others.
    fn offenders(folder: &Path, found: &mut Vec<String>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.ends_with("src/sync") {
                continue;
            }
            if path.is_dir() {
                offenders(&path, found);
            } else if is_offender(&fs::read_to_string(&path).unwrap()) {
                found.push(path.display().to_string());
            }
        }
    }

    fn is_offender(source: &str) -> bool {
        ["core::sync", "core::hint", "spin::"].iter().any(|name| source.contains(name))
    }

    #[test]
    #[cfg_attr(miri, ignore = "reads files")]
    fn no_other_module_names_atomics_of_its_own() {
        let mut found = Vec::new();
        offenders(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
        assert!(found.is_empty(), "must import from crate::sync: {found:?}");
        assert!(is_offender("use core::sync::atomic::AtomicU8;"));
    }
}
