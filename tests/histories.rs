//! Histories: many callers write down what they sent and what they were answered while servers, Redis and connections
//! fail, and a checker judges from these records alone whether the guarantees held.

mod checker;
mod checker_tests;
mod keys;
mod kill;
mod load;
mod proxy;
mod random;
mod recorder;
mod retry;
mod shared;
mod validate;
mod vanish;
mod worker;
