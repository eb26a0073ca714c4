//! The contract, proved over the wire: every test talks gRPC to the real server binary on a real store.
//!
//! `tests/run` builds the binaries first and runs everything.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, unreachable_pub)]

mod admin;
mod backup;
mod bad_inputs;
mod clients;
mod command;
mod consume;
mod consumer;
mod durability;
mod faults;
mod guarantees;
mod histories;
mod house;
mod life;
mod produce;
mod program;
mod support;
mod topologies;
