//! Where the server is: `host:port`, with or without `http://`.

use crate::{Error, Result};

/// The longest address that is looked at.
const MAX_BYTES: usize = 512;

/// The URI for an address as people write it. What was given is not repeated in the error: it may carry credentials.
pub(crate) fn uri(address: &str) -> Result<String> {
    let authority = match address.split_once("://") {
        None => address,
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => rest.strip_suffix('/').unwrap_or(rest),
        Some((scheme, _)) if scheme.eq_ignore_ascii_case("https") => {
            return Err(invalid("https:// is not supported: use http:// or host:port"));
        }
        Some(_) => return Err(invalid("the scheme of the address is not http")),
    };
    if address.len() > MAX_BYTES {
        return Err(invalid("the address is too long"));
    }
    if authority.contains(['/', '?', '#', '@']) || authority.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Err(invalid("the address is more than host:port"));
    }
    let Some((host, port)) = authority.rsplit_once(':') else {
        return Err(invalid("the address has no port: write host:port, such as 127.0.0.1:50051"));
    };
    if host.is_empty() || (host.contains(':') && !(host.starts_with('[') && host.ends_with(']'))) {
        return Err(invalid("the address has no proper host: write host:port or [ipv6]:port"));
    }
    match port.parse::<u16>() {
        Ok(port) if port > 0 => Ok(format!("http://{host}:{port}")),
        _ => Err(invalid("the port of the address is not a number from 1 to 65535")),
    }
}

fn invalid(message: &str) -> Error {
    Error::invalid_argument(message, "address")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::uri;
    use crate::ErrorKind;

    #[test]
    fn an_address_is_taken_with_and_without_its_scheme() {
        for given in ["127.0.0.1:50051", "http://127.0.0.1:50051", "http://127.0.0.1:50051/", "HTTP://127.0.0.1:50051"]
        {
            assert_eq!(uri(given).unwrap(), "http://127.0.0.1:50051", "{given}");
        }
        assert_eq!(uri("queue.example:1").unwrap(), "http://queue.example:1");
        assert_eq!(uri("[::1]:50051").unwrap(), "http://[::1]:50051");
    }

    #[test]
    fn what_is_no_address_is_refused_and_not_repeated() {
        let long = "a".repeat(600);
        for given in [
            "",
            "localhost",
            ":50051",
            "::1:50051",
            "host:0",
            "host:65536",
            "host:x",
            "host:",
            "a b:1",
            "http://host:1/path",
            "https://host:1",
            "ftp://host:1",
            "me:secret@host:1",
            &long,
        ] {
            let error = uri(given).expect_err(given);
            assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{given}");
            assert_eq!(error.field(), Some("address"));
            assert!(!error.to_string().contains("secret"));
        }
    }
}
