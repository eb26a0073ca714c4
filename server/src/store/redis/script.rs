//! The scripts, and one call of one of them.

use std::sync::LazyLock;

use bb8_redis::redis::{
    Cmd, ErrorKind, FromRedisValue, RedisError, Script, ServerErrorKind, aio::MultiplexedConnection, cmd,
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
        pub(super) static $name: LazyLock<Script> = LazyLock::new(|| {
            Script::new(&[PRELUDE, COMMON, include_str!(concat!("../../../lua/", $file))].join("\n"))
        });
    )*};
}

scripts! {
    INSERT = "insert.lua";
    POP = "pop.lua";
    ACK = "ack.lua";
    HEARTBEAT = "heartbeat.lua";
    RELEASE = "release.lua";
    HELD = "held.lua";
    LOOK = "look.lua";
    COUNTS = "counts.lua";
}

/// A call of a script: its keys are given, its arguments are added.
pub(super) struct Call {
    script: &'static Script,
    command: Cmd,
}

impl Call {
    pub(super) fn new(script: &'static Script, keys: &[String]) -> Self {
        let mut command = cmd("EVALSHA");
        command.arg(script.get_hash()).arg(keys.len()).arg(keys);
        Self { script, command }
    }

    pub(super) fn arg(mut self, arg: impl bb8_redis::redis::ToRedisArgs) -> Self {
        self.command.arg(arg);
        self
    }

    /// Runs it. A script that Redis does not know did not run, so it is loaded and run again.
    pub(super) async fn run<T: FromRedisValue>(&self, connection: &mut MultiplexedConnection) -> Result<T, RedisError> {
        match self.command.query_async(connection).await {
            Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
                self.script.load_async(connection).await?;
                self.command.query_async(connection).await
            }
            other => other,
        }
    }
}
