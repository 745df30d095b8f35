//! The serial port COM1, where all that the kernel says goes.
//!
//! Ordinary code prints through [`print!`](crate::print) and [`println!`](crate::println), under a lock that keeps
//! interrupts off. Who reports that the kernel stops may have interrupted the holder of that lock, so it writes through
//! [`emergency`], which takes none.

use core::fmt;

use crate::cpus::Cpus;
use kslab::{IrqGuard, IrqLock};
use uart_16550::backend::PioBackend;
use uart_16550::{BaudRate, Config, Uart16550};

static COM1: IrqLock<Cpus, Port> = IrqLock::new(Port::com1());

/// A serial port that text can be written to.
pub struct Port(Uart16550<PioBackend>);

impl Port {
    const fn com1() -> Self {
        // SAFETY: 0x3f8 is where a PC has the eight registers of COM1, and nothing else.
        match unsafe { Uart16550::new_port(0x3f8) } {
            Ok(uart) => Self(uart),
            Err(_) => panic!("the ports of COM1 fit below 0x10000"),
        }
    }

    /// Writes bytes that may be no text.
    pub fn write(&mut self, bytes: &[u8]) {
        self.0.send_bytes_exact(bytes);
    }
}

impl fmt::Write for Port {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.write(text.as_bytes());
        Ok(())
    }
}

impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Port(COM1)")
    }
}

/// Sets COM1 to 115200 baud, 8 data bits, no parity, 1 stop bit.
pub fn init() {
    let config = Config { baud_rate: BaudRate::Baud115200, ..Config::DEFAULT };
    // Without a serial port the kernel has nobody to tell so.
    let _ = COM1.lock().0.init(config);
}

/// COM1, locked; interrupts are off on this CPU until the guard is dropped.
pub fn lock() -> IrqGuard<'static, Cpus, Port> {
    COM1.lock()
}

/// COM1 without the lock. Only for reporting that the kernel stops: the text may land in the middle of another's line.
pub fn emergency() -> Port {
    Port::com1()
}

/// Prints to COM1.
#[macro_export]
macro_rules! print {
    ($($arguments:tt)*) => {{
        // The port reports no errors.
        let _ = ::core::fmt::Write::write_fmt(&mut *$crate::serial::lock(), ::core::format_args!($($arguments)*));
    }};
}

/// Prints a line to COM1.
#[macro_export]
macro_rules! println {
    () => { $crate::print!("\n") };
    ($($arguments:tt)*) => { $crate::print!("{}\n", ::core::format_args!($($arguments)*)) };
}
