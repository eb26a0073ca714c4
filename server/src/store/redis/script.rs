//! The scripts, and one call of one of them.

use std::sync::LazyLock;

use bb8_redis::redis::{
    Arg, Cmd, ErrorKind, FromRedisValue, RedisError, Script, ServerErrorKind, ToRedisArgs, aio::MultiplexedConnection,
    cmd,
};

const COMMON: &str = include_str!("../../../lua/common.lua");

// Only the tests can be built with a clock that is not Redis' own.
#[cfg(not(test))]
const PRELUDE: &str = include_str!("../../../lua/prelude.lua");
#[cfg(test)]
const PRELUDE: &str = include_str!("../../../lua/prelude_test.lua");

macro_rules! scripts {
    ($($(#[$doc:meta])* $name:ident = $file:literal;)*) => {$(
        $(#[$doc])*
        pub(super) static $name: LazyLock<Source> = LazyLock::new(|| {
            Source::new([PRELUDE, COMMON, include_str!(concat!("../../../lua/", $file))].join("\n"))
        });
    )*};
}

scripts! {
    INSERT = "insert.lua";
    PRODUCE = "produce.lua";
    POP = "pop.lua";
    ACK = "ack.lua";
    HEARTBEAT = "heartbeat.lua";
    RELEASE = "release.lua";
    WITHDRAW = "withdraw.lua";
    HELD = "held.lua";
    LOOK = "look.lua";
    COUNTS = "counts.lua";
}

/// A script, and the hash under which Redis knows it once it has run.
pub(super) struct Source {
    code: String,
    hash: String,
}

impl Source {
    fn new(code: String) -> Self {
        let hash = Script::new(&code).get_hash().to_owned();
        Self { code, hash }
    }
}

/// A call of a script: its keys are given, its arguments are added.
pub(super) struct Call {
    source: &'static Source,
    command: Cmd,
}

impl Call {
    pub(super) fn new(source: &'static Source, keys: &[String]) -> Self {
        let mut command = cmd("EVALSHA");
        command.arg(&source.hash).arg(keys.len()).arg(keys);
        Self { source, command }
    }

    pub(super) fn arg(mut self, arg: impl ToRedisArgs) -> Self {
        self.command.arg(arg);
        self
    }

    /// Runs it. A script that Redis does not know did not run: it is sent whole then, in one step with its run, for
    /// Redis might forget it again in between.
    pub(super) async fn run<T: FromRedisValue>(&self, connection: &mut MultiplexedConnection) -> Result<T, RedisError> {
        match self.command.query_async(connection).await {
            Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
                self.whole().query_async(connection).await
            }
            other => other,
        }
    }

    fn whole(&self) -> Cmd {
        let mut command = cmd("EVAL");
        command.arg(&self.source.code);
        for arg in self.command.args_iter().skip(2) {
            if let Arg::Simple(bytes) = arg {
                command.arg(bytes);
            }
        }
        command
    }
}
