//! The table of bad inputs: what each gets, over the wire, on every store. A test is a row, named by its number.
//!
//! After each row the server answers good calls, and nothing was inserted, leased or changed (`Witness`).

mod admin;
mod batches;
mod cancel;
mod files;
mod flood;
mod frames;
mod plans;
mod queues;
mod request_ids;
mod sockets;
mod stalled;
mod startup;
mod store_down;
mod times;
mod tokens;
mod transport;
mod values;
