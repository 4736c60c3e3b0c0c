//! The way to what runs in a sandbox, for the sandbox listener.

use http_api::ids::SandboxId;
use http_api::wire::{ResumeSandbox, SandboxState};
use http_api::{ApiError, ControlPlane, Traffic, Way};
use tokio::time::Instant;

use super::Gateway;
use crate::shard::{Request, Route};

impl Traffic for Gateway {
    async fn way(&self, id: SandboxId) -> Result<Way, ApiError> {
        self.host.metrics.traffic.inc();
        let deadline = Instant::now() + self.host.boot_timeout;
        loop {
            let route = self.ask(&id, |reply| Request::Route(id.clone(), reply));
            let denied = match route.await {
                Ok(route) => return Ok(way(route)),
                Err(ApiError::Denied { state, detail }) => (state, detail),
                Err(error) => return Err(error),
            };
            let (state, detail) = denied;
            if Instant::now() >= deadline {
                return Err(ApiError::Unavailable { detail });
            }
            match state {
                SandboxState::Paused => {
                    let row = self.ask(&id, |reply| Request::Row(id.clone(), reply));
                    if !row.await?.lifetime.auto_resume {
                        return Err(ApiError::Denied { state, detail });
                    }
                    match self
                        .resume(id.clone().into(), ResumeSandbox::default())
                        .await
                    {
                        Ok(_) => {
                            self.host.metrics.woken.inc();
                        }
                        // Another request was faster, or it was paused again: look.
                        Err(ApiError::Denied { .. }) => {}
                        Err(error) => return Err(error),
                    }
                }
                SandboxState::Failed | SandboxState::Destroying => {
                    return Err(ApiError::Denied { state, detail });
                }
                // On its way somewhere: traffic waits to see where.
                _ => {
                    let mut watch = self.watch(&id).await?;
                    let settled = watch.wait_for(|state| state.is_settled());
                    let _ = tokio::time::timeout_at(deadline, settled).await;
                }
            }
        }
    }

    fn is_host_only(&self, port: u16, path: &str) -> bool {
        port == envd::protocol::PORT && envd::protocol::is_host_only(path)
    }
}

fn way(mut route: Route) -> Way {
    Way {
        address: route.address.into(),
        left: Box::pin(async move {
            route.left().await;
        }),
    }
}
