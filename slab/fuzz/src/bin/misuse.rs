//! See `kslab_fuzz::misuse`.

#![cfg_attr(fuzzing, no_main)]

kslab_fuzz::target!(kslab_fuzz::misuse);
