//! Histories: many callers write down what they sent and what they were answered while servers, Redis and connections
//! fail, and a checker judges from these records alone whether the guarantees held.

mod behind;
mod books;
mod books_tests;
pub mod checker;
mod checker_tests;
mod disk;
mod embedded;
mod give_back;
mod injected;
mod kill;
mod lives;
pub mod load;
mod power_cut;
pub mod random;
pub mod recorder;
mod retry;
mod shared;
mod stream;
mod validate;
mod vanish;
mod worker;
