//! The machine: which one it is, where things run on it, how fast its disk syncs.

use std::{
    fs::{self, File},
    io::Write,
    path::Path,
    process::{self, Command},
    time::{Duration, Instant},
};

use crate::{
    dataqueue,
    fault::Result,
    options::Options,
    report::{Report, quantile},
    scratch::Scratch,
};

/// So much is appended before each sync of the disk's own measurement: about what one small commit adds.
const APPEND: usize = 4096;
const SYNCS: usize = 200;

/// Pins this process, and with it all that it starts, and notes what the figures depend on.
pub(crate) async fn describe(options: &Options, report: &mut Report) -> Result<()> {
    let date = Command::new("date").args(["-u", "+%F"]).output()?;
    report.setting("date", String::from_utf8_lossy(&date.stdout).trim().to_owned());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let model = field("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown processor".to_owned());
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    report.setting("machine", format!("{cores} cores of {model}, Linux {}", kernel.trim()));
    let placement = match pin(options) {
        Ok(()) => format!("client and servers together on core {} (taskset -c {0})", options.core),
        Err(fault) => format!("NOT PINNED, the ratios wander: {fault} (apt-get install util-linux)"),
    };
    report.setting("cores", placement);
    let scratch = Scratch::new(options)?;
    let system = Command::new("stat").args(["-f", "-c", "%T"]).arg(scratch.path()).output()?;
    let system = String::from_utf8_lossy(&system.stdout).trim().to_owned();
    let memory = if system == "tmpfs" { ": NO DISK, syncs cost nothing there; use --dir" } else { "" };
    let sync = sync_times(scratch.path())?;
    let [median, late] = [0.5, 0.99].map(|share| quantile(&sync, share));
    report.setting(
        "disk",
        format!("{system}{memory}; fdatasync after {APPEND} bytes: p50 {median:.0} µs, p99 {late:.0} µs"),
    );
    let build = if cfg!(debug_assertions) { "debug: the figures mean nothing" } else { "release" };
    report.setting("build", build.to_owned());
    let size = if options.smoke { "smoke: the figures mean nothing; " } else { "" };
    report.setting(
        "rounds",
        format!(
            "{size}{} of each, contenders in turn, a fresh server on an empty directory each time; median (min to max)",
            options.rounds()
        ),
    );
    report.setting("client", "tonic, one thread unless said".to_owned());
    report.version("data-queue-server", dataqueue::version()?);
    let server = dataqueue::Server::start(&scratch.path().join("data"), &[])?;
    report.version("its store", server.store().await?);
    Ok(())
}

/// Keeps this process, and all that it starts from now on, on one core: a rate is then one over the processor time that
/// a task costs all who take part, and that repeats.
pub(crate) fn pin(options: &Options) -> Result<()> {
    place(&options.core.to_string())
}

/// Lets this process, and all that it starts from now on, have every core.
pub(crate) fn free() -> Result<()> {
    place(fs::read_to_string("/sys/devices/system/cpu/online")?.trim())
}

/// Puts this process on a core beside that of what it has started, if there is one.
pub(crate) fn beside(options: &Options) -> Result<()> {
    let core = if options.core == 0 { 1 } else { options.core - 1 };
    place(&core.to_string()).or_else(|_| pin(options))
}

fn place(cores: &str) -> Result<()> {
    let output = Command::new("taskset").args(["-a", "-c", "-p", cores, &process::id().to_string()]).output()?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).trim().into()) }
}

fn field(file: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// Microseconds of each sync.
fn sync_times(directory: &Path) -> Result<Vec<f64>> {
    let mut file = File::create(directory.join("sync"))?;
    let block = [b'x'; APPEND];
    let mut times = Vec::new();
    for _ in 0..SYNCS {
        file.write_all(&block)?;
        let start = Instant::now();
        file.sync_data()?;
        times.push(micros(start.elapsed()));
    }
    Ok(times)
}

pub(crate) fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}
