// Makes src/gen: the messages and services of the protos, and the channel's service config, so that the package needs no other file.
import { execFileSync } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";

process.chdir(fileURLToPath(new URL("..", import.meta.url)));
execFileSync("buf", ["generate"], { stdio: "inherit" });
const config = JSON.stringify(JSON.parse(readFileSync("../service_config.json", "utf8")));
writeFileSync("src/gen/service_config.ts", `export const SERVICE_CONFIG = ${JSON.stringify(config)};\n`);
