//! To be written.

use crate::{fault::Result, options::Options, report::Report};

pub(crate) async fn run(_: &Options, _: &mut Report) -> Result<()> {
    Ok(())
}
