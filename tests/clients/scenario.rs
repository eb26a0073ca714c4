//! The scenario that every client runs: `client/scenario.json`.

use std::fs;

use super::program::{Running, for_every_client};
use crate::support::unique_queue;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/client/scenario.json");

/// How many steps the scenario has.
fn steps() -> usize {
    let scenario: serde_json::Value = serde_json::from_str(&fs::read_to_string(FILE).unwrap()).unwrap();
    scenario["steps"].as_array().expect("steps").len()
}

for_every_client! {
    /// Each step goes as the file says, while the server is killed when the program asks for it.
    async fn the_scenario_goes_as_written(language, backend) {
        let server = backend.start(&[]).await;
        let address = server.address().to_string();
        let prefix = unique_queue("scenario");
        let mut program =
            Running::start(language, &["scenario", "--addr", &address, "--file", FILE, "--prefix", &prefix]);
        let (mut done, mut restarts) = (0, 0);
        while let Some(line) = program.line().await {
            if line == "restart" {
                server.restart().await;
                restarts += 1;
                continue;
            }
            done += 1;
            assert!(line.starts_with(&format!("ok {done} ")), "{line}, after {:#?}", program.said());
        }
        assert!(program.ended().await.success(), "{:#?}", program.said());
        assert_eq!((done, restarts), (steps(), 1));
    }
}
