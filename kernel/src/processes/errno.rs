//! Why a system call fails: the numbers of errno(3), as Linux has them on i386.

#![forbid(unsafe_code)]

use core::fmt;

/// Why a system call failed. The program gets the number negated, from -1 to -4095.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Errno {
    /// Not allowed.
    Eperm = 1,
    /// No such open file.
    Ebadf = 9,
    /// No memory, or no addresses.
    Enomem = 12,
    /// A bad address.
    Efault = 14,
    /// Something is there already.
    Eexist = 17,
    /// An argument makes no sense.
    Einval = 22,
    /// There is no such system call.
    Enosys = 38,
    /// A number does not fit.
    Eoverflow = 75,
}

impl Errno {
    const ALL: [Self; 8] = [
        Self::Eperm,
        Self::Ebadf,
        Self::Enomem,
        Self::Efault,
        Self::Eexist,
        Self::Einval,
        Self::Enosys,
        Self::Eoverflow,
    ];

    /// What the program gets.
    pub const fn result(self) -> i64 {
        -(self as i64)
    }

    /// The one that a program gets as `result`; `None` where that is none of them.
    pub fn from_result(result: i64) -> Option<Self> {
        Self::ALL.into_iter().find(|errno| errno.result() == result)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eperm => "EPERM",
            Self::Ebadf => "EBADF",
            Self::Enomem => "ENOMEM",
            Self::Efault => "EFAULT",
            Self::Eexist => "EEXIST",
            Self::Einval => "EINVAL",
            Self::Enosys => "ENOSYS",
            Self::Eoverflow => "EOVERFLOW",
        })
    }
}
