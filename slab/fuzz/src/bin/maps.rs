//! See `kslab_fuzz::maps`.

#![cfg_attr(fuzzing, no_main)]

kslab_fuzz::target!(kslab_fuzz::maps);
