//! `thaw token`: who may ask the daemon.

use std::process::ExitCode;

use anyhow::Result;
use http_api::auth::Scope;
use serde_json::json;

use crate::args::{TokenArgs, TokenCommand, TokenScope};
use crate::catalogue::tokens::scope_name;
use crate::clock::{hex, random};
use crate::config::Config;
use crate::tokens;

/// Runs one of them.
///
/// # Errors
/// The configuration or the catalogue can't be used, or a name is wrong.
pub fn token(args: &TokenArgs) -> Result<ExitCode> {
    let catalogue = Config::read(&args.config)?.catalogue();
    match &args.command {
        TokenCommand::Create { name, scope } => {
            let scope = match scope {
                TokenScope::Full => Scope::Full,
                TokenScope::Metrics => Scope::Metrics,
            };
            let chosen = || format!("token-{}", hex(&random::<4>()));
            let name = name.clone().unwrap_or_else(chosen);
            let token = tokens::create(&catalogue, &name, scope)?;
            if args.json {
                println!("{}", json!({ "name": name, "token": token }));
            } else {
                println!("{token}");
                eprintln!("This is token {name:?}; it is not shown again.");
            }
        }
        TokenCommand::List => {
            let all = tokens::list(&catalogue)?;
            if args.json {
                let all: Vec<_> = all
                    .iter()
                    .map(|row| {
                        json!({
                            "name": row.name,
                            "scope": scope_name(row.scope),
                            "created_at_ms": row.created_at_ms,
                        })
                    })
                    .collect();
                println!("{}", serde_json::to_string_pretty(&all)?);
            } else {
                for row in all {
                    println!("{:<32} {}", row.name, scope_name(row.scope));
                }
            }
        }
        TokenCommand::Revoke { name } => tokens::revoke(&catalogue, name)?,
    }
    Ok(ExitCode::SUCCESS)
}
