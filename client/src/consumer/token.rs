//! Lease tokens, as a consumer keeps them.

use crate::{Error, Result, task::hex};

/// A lease token. Its text is 32 hex characters; so it is small, and a list of them is one piece of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Token(u128);

/// Nobody's token: a heartbeat for it changes nothing, and its answer tells that all before it was heard.
pub(super) const FENCE: Token = Token(0);

impl Token {
    pub(super) fn parse(text: &str) -> Result<Self> {
        let digits = text.chars().try_fold(0, |value, digit| Some(value << 4 | u128::from(digit.to_digit(16)?)));
        let token = digits.filter(|_| text.len() == 32).map(Self);
        token.ok_or_else(|| Error::internal("the server sent a lease token that is not 32 hex characters"))
    }

    pub(super) fn text(self) -> String {
        hex(&self.0.to_be_bytes())
    }
}
