//! The clients of every language, each by its program, against a real server: `tests/run` builds them, as `client/README.md` says.

mod mixed;
mod program;
mod readme;
mod scenario;
mod stop;
