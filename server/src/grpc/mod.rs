//! The gRPC edge. It translates and decides nothing: decode, ask the queue, encode.

mod admin;
mod consume;
mod edge;
mod handover;
mod produce;
mod service;
mod shortcut;
mod socket;
mod status;

pub use self::{
    admin::QueueAdminService,
    edge::{Calls, EdgeLayer},
    service::DataQueueService,
    shortcut::ShortcutLayer,
    socket::Socket,
};
