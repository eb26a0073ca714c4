//! How a Redis is written, and where its servers are.

use std::{fmt, path::PathBuf};

use bb8_redis::redis::{ConnectionAddr, ConnectionInfo, IntoConnectionInfo, RedisConnectionInfo};

use super::link::describe;

/// What every address may begin with, and how it goes on.
pub const FORMS: &str = "redis://[user:password@]host[:port][/db], redis+sentinel://[user:password@]host[:port],.../master[/db] or \
                         redis+cluster://[user:password@]host[:port],..., each also with rediss for TLS";

/// Where sentinels listen, if they are not told otherwise.
const SENTINEL_PORT: u16 = 26_379;

/// Who asks, and with what it proves it.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// The user of Redis, if not that of the address.
    pub user: Option<String>,
    /// Holds the password of Redis; read at each connect.
    pub password_file: Option<PathBuf>,
    /// The user of the sentinels.
    pub sentinel_user: Option<String>,
    /// Holds the password of the sentinels; read at each connect.
    pub sentinel_password_file: Option<PathBuf>,
    /// PEM: who signs the certificates of Redis, if none that this machine trusts.
    pub ca: Option<PathBuf>,
    /// PEM: this server's certificate, and its key.
    pub certificate: Option<(PathBuf, PathBuf)>,
}

/// The servers of a Redis, and how they belong together.
#[derive(Clone, Debug)]
pub(super) enum Address {
    One(ConnectionInfo),
    /// Sentinels tell which server is the master of this name.
    Sentinel {
        sentinels: Vec<ConnectionInfo>,
        master: String,
        redis: RedisConnectionInfo,
    },
    /// Some of the nodes, which know the others.
    Cluster(Vec<ConnectionInfo>),
}

impl Address {
    /// The message says what is wrong with the address without repeating it.
    pub(super) fn parse(url: &str) -> Result<Self, String> {
        let (scheme, rest) = url.split_once("://").ok_or_else(|| "it is no address".to_owned())?;
        let (plain, kind) = scheme.split_once('+').map_or((scheme, None), |(plain, kind)| (plain, Some(kind)));
        if !matches!(plain, "redis" | "rediss") {
            return Err("its scheme is none that is known".to_owned());
        }
        let (login, rest) = match rest.rsplit_once('@') {
            Some((login, rest)) => (format!("{login}@"), rest),
            None => (String::new(), rest),
        };
        let (hosts, path) = rest.split_once('/').unwrap_or((rest, ""));
        let one = |host: &str, path: &str| {
            let parsed = format!("{plain}://{login}{host}/{path}").into_connection_info();
            parsed.map_err(|error| describe(&error))
        };
        if hosts.split(',').any(str::is_empty) {
            return Err("a host is missing".to_owned());
        }
        match kind {
            None if hosts.contains(',') => {
                Err("several hosts are sentinels or a cluster: its scheme says which".to_owned())
            }
            None => one(hosts, path).map(Self::One),
            Some("cluster") if path.is_empty() || path == "0" => {
                hosts.split(',').map(|host| one(host, "")).collect::<Result<_, _>>().map(Self::Cluster)
            }
            Some("cluster") => Err("a cluster has the database 0 alone".to_owned()),
            Some("sentinel") => {
                let (master, db) = path.split_once('/').unwrap_or((path, ""));
                if master.is_empty() {
                    return Err("the name of the master is missing behind the sentinels".to_owned());
                }
                let with_port = |host: &str| {
                    let has_port = host.rsplit_once(':').is_some_and(|(_, port)| !port.ends_with(']'));
                    if has_port { host.to_owned() } else { format!("{host}:{SENTINEL_PORT}") }
                };
                let infos: Vec<_> = hosts.split(',').map(|host| one(&with_port(host), db)).collect::<Result<_, _>>()?;
                let redis = infos[0].redis_settings().clone();
                // The login is that of Redis, not of the sentinels.
                let sentinels = infos.into_iter().map(|info| info.set_redis_settings(RedisConnectionInfo::default()));
                Ok(Self::Sentinel { sentinels: sentinels.collect(), master: master.to_owned(), redis })
            }
            Some(_) => Err("its scheme is none that is known".to_owned()),
        }
    }

    pub(super) fn is_cluster(&self) -> bool {
        matches!(self, Self::Cluster(_))
    }

    pub(super) fn is_encrypted(&self) -> bool {
        self.servers().iter().any(|info| matches!(info.addr(), ConnectionAddr::TcpTls { .. }))
    }

    pub(super) fn has_password(&self) -> bool {
        match self {
            Self::Sentinel { redis, .. } => redis.password().is_some(),
            Self::One(info) => info.redis_settings().password().is_some(),
            Self::Cluster(nodes) => nodes.iter().any(|info| info.redis_settings().password().is_some()),
        }
    }

    /// Those that the address names.
    pub(super) fn servers(&self) -> &[ConnectionInfo] {
        match self {
            Self::One(info) => std::slice::from_ref(info),
            Self::Sentinel { sentinels: servers, .. } | Self::Cluster(servers) => servers,
        }
    }
}

/// For people: without the login.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let servers: Vec<_> = self.servers().iter().map(|info| info.addr().to_string()).collect();
        f.write_str(&servers.join(","))?;
        match self {
            Self::Sentinel { master, .. } => write!(f, "/{master}"),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_read_and_shown_without_its_login() {
        for (url, shown, is_encrypted) in [
            ("redis://localhost", "localhost:6379", false),
            ("rediss://u:p%40@10.0.0.1:7000/3", "10.0.0.1:7000", true),
            ("redis+sentinel://:p@a,b:1,[::1]:2/mymaster/2", "a:26379,b:1,::1:2/mymaster", false),
            ("redis+sentinel://[::1]/m", "::1:26379/m", false),
            ("rediss+cluster://u:p@a:7000,b:7001", "a:7000,b:7001", true),
            ("redis+cluster://a,b/0", "a:6379,b:6379", false),
        ] {
            let address = Address::parse(url).unwrap();
            assert_eq!((address.to_string().as_str(), address.is_encrypted()), (shown, is_encrypted), "{url}");
            assert_eq!(address.has_password(), url.contains('@'), "{url}");
        }
        let Address::Sentinel { sentinels, redis, .. } = Address::parse("redis+sentinel://u:p%40@a/m/2").unwrap()
        else {
            panic!("sentinels");
        };
        assert_eq!((redis.username(), redis.password(), redis.db()), (Some("u"), Some("p@"), 2));
        assert_eq!(sentinels[0].redis_settings().password(), None);
    }

    #[test]
    fn what_is_no_address_is_told_without_its_password() {
        for url in [
            "redis",
            "redis:",
            "http://secret@a",
            "redis+other://a",
            "redis+sentinel://secret:secret@a",
            "redis+cluster://a/1",
            "redis://a,b",
            "redis+cluster://",
            "redis+cluster://a,,b",
            "redis+cluster://a:port",
            "redis+sentinel://a:99999/m",
            "redis+sentinel://a//2",
        ] {
            let problem = Address::parse(url).unwrap_err();
            assert!(!problem.is_empty() && !problem.contains("secret"), "{url}: {problem}");
        }
    }
}
