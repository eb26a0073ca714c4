//! `data-queue health`: whether a server serves.

use std::{process::ExitCode, time::Duration};

use clap::Args as ClapArgs;
use data_queue_proto::v1;
use tonic::{Code, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use crate::{
    Stop,
    args::{Common, span},
    out::{Out, Row},
    server::{self, Admin, Server, explain, timed},
};

/// The name under which a server tells whether its queues can be used.
const SERVICE: &str = "dataqueue.v1.DataQueue";

/// Tells whether the server serves; for scripts, and for the probes of containers
///
/// Exit code 0: it serves. 1: it does not, since its store is away or it stops, or it does not answer; one line on stderr says why.
#[derive(Debug, ClapArgs)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Health {
    /// How long it may take in all, 100ms to 1m
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = patience)]
    timeout: Duration,
}

const AFTER_HELP: &str = "\
Columns: address, status (serving), version, store. JSON: these, and survives_note (what an answered insert survives).
For other programs: the server tells the same under grpc.health.v1.Health, for the service dataqueue.v1.DataQueue.";

impl Health {
    pub(crate) async fn run(self, common: &Common) -> Result<ExitCode, Stop> {
        let server = Server::new(&common.addr)?;
        let looked = tokio::time::timeout(self.timeout, look(&server));
        let info = looked.await.unwrap_or_else(|_| {
            let timeout = humantime::format_duration(self.timeout);
            Err(Stop::failed(format!("the server at {} did not answer within {timeout}", server.address())))
        })?;
        let v1::GetServerInfoResponse { version, store, survives_note, .. } = info;
        let words = format!("{} is serving: {version}, {store}", server.address());
        let row = Row::new()
            .with("address", server.address())
            .with("status", "serving")
            .with("version", version)
            .with("store", store)
            .with_json("survives_note", survives_note);
        Out::new(common.output).done(&words, &row)?;
        Ok(ExitCode::SUCCESS)
    }
}

async fn look(server: &Server) -> Result<v1::GetServerInfoResponse, Stop> {
    let address = server.address();
    let channel = server.connect().await?;
    let request = timed(HealthCheckRequest { service: SERVICE.to_owned() });
    let answer = HealthClient::new(channel.clone()).check(request).await.map_err(|status| match status.code() {
        Code::Unimplemented | Code::NotFound => Stop::failed(format!(
            "what answers at {address} does not tell the health of {SERVICE}: is it a data-queue-server?"
        )),
        _ => Stop::failed(format!("the server at {address} does not tell its health: {}", explain(status))),
    })?;
    if answer.into_inner().status() != ServingStatus::Serving {
        return Err(Stop::failed(format!("the server at {address} is not serving: {}", why_not(channel).await)));
    }
    let info = Admin::new(channel).get_server_info(timed(v1::GetServerInfoRequest {})).await;
    info.map(tonic::Response::into_inner).map_err(|status| {
        Stop::failed(format!("the server at {address} does not tell what it is: {}", explain(status)))
    })
}

/// A call that needs the store is told.
async fn why_not(channel: Channel) -> String {
    let request = server::timed(v1::ListQueuesRequest { page_size: 1, page_token: String::new() });
    match Admin::new(channel).list_queues(request).await {
        Err(status) => explain(status),
        Ok(_) => "it was not a moment ago".to_owned(),
    }
}

fn patience(text: &str) -> Result<Duration, String> {
    match span(text)? {
        patience if (Duration::from_millis(100)..=Duration::from_secs(60)).contains(&patience) => Ok(patience),
        _ => Err("it is 100ms to 1m".to_owned()),
    }
}
