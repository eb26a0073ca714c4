//! Faults: what is killed, cut, filled or stopped while it works, and what must hold then.

mod full;
mod load;
mod replicas;
mod shutdown;
mod store_faults;
