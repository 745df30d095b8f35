//! Address translations that every CPU must forget.
//!
//! A CPU keeps translations that it has used. Before the frame of a page that is no longer mapped serves anything else, all
//! CPUs forget theirs. Nothing is mapped as global, so loading CR3 is enough.

use core::sync::atomic::Ordering;

use x86_64::instructions::interrupts::without_interrupts;
use x86_64::instructions::tlb;

use super::{all, apic, block, this};

/// Has every CPU forget all its address translations, and waits until they have. The page tables were changed before.
///
/// The caller holds no lock that a CPU may spin on with interrupts off.
pub(crate) fn flush_everywhere() {
    without_interrupts(|| {
        tlb::flush_all();
        let here = this().number();
        let mut tickets = [0; super::MAX];
        // A CPU that is not online yet will flush when it is.
        for other in all().filter(|other| other.number() != here && other.mail.state.answers()) {
            tickets[other.number()] = other.mail.flushes_wanted.fetch_add(1, Ordering::SeqCst) + 1;
            apic::send(apic::FLUSH_VECTOR, other.apic_id());
        }
        for (number, ticket) in tickets.into_iter().enumerate().filter(|(_, ticket)| *ticket != 0) {
            if let Some(other) = block(number) {
                // Others may wait for this CPU likewise. Their functions have to wait: whoever called may not expect them.
                while other.mail.flushes_done.load(Ordering::SeqCst) < ticket {
                    serve();
                    core::hint::spin_loop();
                }
            }
        }
    });
}

/// Forgets the translations of this CPU if another has asked for it.
pub(super) fn serve() {
    let mail = &this().mail;
    let wanted = mail.flushes_wanted.load(Ordering::SeqCst);
    if mail.flushes_done.load(Ordering::Relaxed) < wanted {
        tlb::flush_all();
        mail.flushes_done.store(wanted, Ordering::SeqCst);
    }
}
