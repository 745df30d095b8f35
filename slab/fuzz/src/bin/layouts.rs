//! See `kslab_fuzz::layouts`.

#![cfg_attr(fuzzing, no_main)]

kslab_fuzz::target!(kslab_fuzz::layouts);
