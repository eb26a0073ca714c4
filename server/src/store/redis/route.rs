//! The way to a Redis. Its servers are found, and passwords read, anew at each connect.

use std::{fs, path::Path, sync::Arc, time::Duration};

use bb8_redis::redis::{
    AsyncConnectionConfig, Client, ClientTlsConfig, ConnectionAddr, ConnectionInfo, ErrorKind, RedisConnectionInfo,
    RedisError, TlsCertificates, TlsMode,
    aio::{MultiplexedConnection, PubSub},
    io::tcp::TcpSettings,
    sentinel::{SentinelClient, SentinelClientBuilder, SentinelServerType},
};

use super::{Access, FORMS, address::Address, nodes::Node};

/// Of the time that a connection may take, a server that need not be there gets this part.
const SERVERS_PER_CONNECT: u32 = 4;

pub(super) struct Route {
    address: Address,
    access: Arc<Access>,
    timeout: Duration,
}

/// What is needed at a connect, as it is now.
struct Proof {
    user: Option<String>,
    password: Option<String>,
    sentinel_user: Option<String>,
    sentinel_password: Option<String>,
    certificates: TlsCertificates,
}

impl Route {
    /// Connects to nothing, but reads the files, so that a wrong one is told at once.
    pub(super) fn new(url: &str, access: &Access, timeout: Duration) -> Result<Self, String> {
        let address = Address::parse(url).map_err(|problem| format!("--store: {problem}; expected {FORMS}"))?;
        if !address.is_encrypted() && (access.ca.is_some() || access.certificate.is_some()) {
            return Err("--redis-ca and --redis-cert are for TLS: write rediss in --store".to_owned());
        }
        if access.password_file.is_some() && address.has_password() {
            return Err("--redis-password-file and --store both have a password; give one".to_owned());
        }
        let has_sentinels = matches!(address, Address::Sentinel { .. });
        if !has_sentinels && (access.sentinel_user.is_some() || access.sentinel_password_file.is_some()) {
            return Err("--sentinel-user and --sentinel-password-file are for redis+sentinel:// in --store".to_owned());
        }
        let proof = Proof::read(access)?;
        if proof.user.is_some() && proof.password.is_none() && !address.has_password() {
            return Err("--redis-user needs --redis-password-file".to_owned());
        }
        if proof.sentinel_user.is_some() && proof.sentinel_password.is_none() {
            return Err("--sentinel-user needs --sentinel-password-file".to_owned());
        }
        if let (true, Some(first)) = (address.is_encrypted(), address.servers().first()) {
            proof.client(first).map_err(|error| format!("--redis-ca, --redis-cert, --redis-key: {error}"))?;
        }
        Ok(Self { address, access: Arc::new(access.clone()), timeout })
    }

    pub(super) fn address(&self) -> &Address {
        &self.address
    }

    /// To this node of a cluster, or to the only server.
    pub(super) async fn connect(&self, node: &Node) -> Result<MultiplexedConnection, RedisError> {
        let proof = self.proof().await?;
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.timeout))
            .set_response_timeout(Some(self.timeout));
        match &self.address {
            Address::One(info) => {
                proof.client(&proof.redis(info))?.get_multiplexed_async_connection_with_config(&config).await
            }
            Address::Sentinel { sentinels, master, redis } => {
                proof.master(sentinels, master, redis)?.get_async_connection_with_config(&config).await
            }
            Address::Cluster(nodes) => {
                let any = nodes.first().ok_or_else(|| RedisError::from((ErrorKind::InvalidClientConfig, "no node")))?;
                let info = at(proof.redis(any), node);
                proof.client(&info)?.get_multiplexed_async_connection_with_config(&config).await
            }
        }
    }

    /// The nodes of a cluster that the address names.
    pub(super) fn seeds(&self) -> Vec<Node> {
        let seed = |info: &ConnectionInfo| match info.addr() {
            ConnectionAddr::Tcp(host, port) | ConnectionAddr::TcpTls { host, port, .. } => Some(Node::at(host, *port)),
            _ => None,
        };
        self.address.servers().iter().filter_map(seed).collect()
    }

    /// A connection that hears what is published. In a cluster every node tells all of it.
    pub(super) async fn listen(&self) -> Result<PubSub, RedisError> {
        let proof = self.proof().await?;
        match &self.address {
            Address::Sentinel { sentinels, master, redis } => {
                proof.master(sentinels, master, redis)?.async_get_client().await?.get_async_pubsub().await
            }
            Address::One(_) | Address::Cluster(_) => {
                let mut last = RedisError::from((ErrorKind::InvalidClientConfig, "no server"));
                for info in self.address.servers() {
                    let connecting = async { proof.client(&proof.redis(info))?.get_async_pubsub().await };
                    match tokio::time::timeout(self.timeout / SERVERS_PER_CONNECT, connecting).await {
                        Ok(Ok(listening)) => return Ok(listening),
                        Ok(Err(error)) => last = error,
                        Err(_) => last = RedisError::from((ErrorKind::Io, "timed out")),
                    }
                }
                Err(last)
            }
        }
    }

    async fn proof(&self) -> Result<Proof, RedisError> {
        let access = Arc::clone(&self.access);
        let read = tokio::task::spawn_blocking(move || Proof::read(&access)).await;
        let read = read.unwrap_or_else(|error| Err(error.to_string()));
        read.map_err(|problem| RedisError::from((ErrorKind::InvalidClientConfig, "cannot log in", problem)))
    }
}

impl Proof {
    fn read(access: &Access) -> Result<Self, String> {
        let bytes = |flag: &str, path: &Path| {
            fs::read(path).map_err(|error| format!("{flag}: cannot read {}: {error}", path.display()))
        };
        let password = |flag: &str, path: Option<&Path>| {
            let read = path.map(|path| {
                let text = String::from_utf8(bytes(flag, path)?);
                let text = text.map_err(|_| format!("{flag}: {} is not UTF-8", path.display()))?;
                // Editors end a file with a newline.
                let text = text.strip_suffix('\n').unwrap_or(&text);
                let text = text.strip_suffix('\r').unwrap_or(text);
                if text.is_empty() { Err(format!("{flag}: {} is empty", path.display())) } else { Ok(text.to_owned()) }
            });
            read.transpose()
        };
        let client_tls = access.certificate.as_ref().map(|(certificate, key)| {
            Ok::<_, String>(ClientTlsConfig {
                client_cert: bytes("--redis-cert", certificate)?,
                client_key: bytes("--redis-key", key)?,
            })
        });
        Ok(Self {
            user: access.user.clone(),
            password: password("--redis-password-file", access.password_file.as_deref())?,
            sentinel_user: access.sentinel_user.clone(),
            sentinel_password: password("--sentinel-password-file", access.sentinel_password_file.as_deref())?,
            certificates: TlsCertificates {
                client_tls: client_tls.transpose()?,
                root_cert: access.ca.as_deref().map(|path| bytes("--redis-ca", path)).transpose()?,
            },
        })
    }

    /// The settings of a server, with who asks.
    fn redis(&self, info: &ConnectionInfo) -> ConnectionInfo {
        let redis = self.login(info.redis_settings().clone());
        info.clone().set_redis_settings(redis).set_tcp_settings(no_delay())
    }

    fn login(&self, mut redis: RedisConnectionInfo) -> RedisConnectionInfo {
        if let Some(user) = &self.user {
            redis = redis.set_username(user);
        }
        if let Some(password) = &self.password {
            redis = redis.set_password(password);
        }
        redis
    }

    fn client(&self, info: &ConnectionInfo) -> Result<Client, RedisError> {
        if is_encrypted(info) {
            Client::build_with_tls(info.clone(), self.certificates.clone())
        } else {
            Client::open(info.clone())
        }
    }

    /// Sentinels are asked at each connect, and who they say is the master has to say so too.
    fn master(
        &self,
        sentinels: &[ConnectionInfo],
        master: &str,
        redis: &RedisConnectionInfo,
    ) -> Result<SentinelClient, RedisError> {
        let addresses = sentinels.iter().map(|info| Ok(self.client(info)?.get_connection_info().addr().clone()));
        let addresses = addresses.collect::<Result<Vec<_>, RedisError>>()?;
        let mut builder = SentinelClientBuilder::new(addresses, master, SentinelServerType::Master)?
            .set_client_to_redis_db(redis.db())
            .set_client_to_redis_tcp_settings(no_delay());
        let redis = self.login(redis.clone());
        if let Some(user) = redis.username() {
            builder = builder.set_client_to_redis_username(user);
        }
        if let Some(password) = redis.password() {
            builder = builder.set_client_to_redis_password(password);
        }
        if let Some(user) = &self.sentinel_user {
            builder = builder.set_client_to_sentinel_username(user);
        }
        if let Some(password) = &self.sentinel_password {
            builder = builder.set_client_to_sentinel_password(password);
        }
        if sentinels.iter().any(is_encrypted) {
            builder = builder.set_client_to_redis_tls_mode(TlsMode::Secure);
            builder = builder.set_client_to_redis_certificates(self.certificates.clone());
        }
        builder.build()
    }
}

/// The same, at this node.
fn at(info: ConnectionInfo, node: &Node) -> ConnectionInfo {
    let Some((host, port)) = node.host_and_port() else { return info };
    let address = match info.addr() {
        ConnectionAddr::TcpTls { insecure, tls_params, .. } => {
            ConnectionAddr::TcpTls { host: host.to_owned(), port, insecure: *insecure, tls_params: tls_params.clone() }
        }
        _ => ConnectionAddr::Tcp(host.to_owned(), port),
    };
    info.set_addr(address)
}

fn is_encrypted(info: &ConnectionInfo) -> bool {
    matches!(info.addr(), ConnectionAddr::TcpTls { .. })
}

fn no_delay() -> TcpSettings {
    TcpSettings::default().set_nodelay(true)
}
