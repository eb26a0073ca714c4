//! Faults: what is killed, cut, filled or stopped while it works, and what must hold then.

mod disk;
mod durability;
mod full;
mod idle;
pub mod load;
mod replicas;
mod rights;
mod scripts;
mod shutdown;
mod store_faults;
mod versions;
