//! The gRPC edge. It translates and decides nothing: decode, ask the queue, encode.

mod edge;
mod handover;
mod service;
mod socket;
mod status;

pub use self::{
    edge::{Calls, EdgeLayer},
    service::DataQueueService,
    socket::Socket,
};
