//! See `kslab_fuzz::frames`.

#![cfg_attr(fuzzing, no_main)]

kslab_fuzz::target!(kslab_fuzz::frames);
