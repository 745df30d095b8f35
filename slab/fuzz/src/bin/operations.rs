//! See `kslab_fuzz::operations`.

#![cfg_attr(fuzzing, no_main)]

kslab_fuzz::target!(kslab_fuzz::operations);
