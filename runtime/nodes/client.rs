//! Requests of a node to its coordinator.

use std::fmt::Display;
use std::time::Duration;

use rehearsal_actors::{Described, ModelSnapshot};
use reqwest::header::RANGE;
use reqwest::{Client, Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::protocol::Manifest;
use super::settings::Credentials;
use crate::error::{Error, Result};

/// How long a request may take, beside those for shards and leases, which end when nothing comes for so long.
const REQUEST: Duration = Duration::from_secs(30);

/// Times that a shard is asked for that does not come whole.
const SHARD_TRIES: u32 = 5;

/// Why a request failed.
pub enum Failure {
    /// The coordinator is not there, or does not know this node: joining again may help.
    Again(String),
    /// It refuses this node for good.
    Refused(String),
}

impl Failure {
    fn again(e: impl Display) -> Self {
        Self::Again(e.to_string())
    }
}

/// A result of a request.
pub type Answer<T> = std::result::Result<T, Failure>;

/// An error with what caused it.
fn explained(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// A connection to a coordinator.
pub struct Coordinator {
    client: Client,
    url: String,
}

impl Coordinator {
    /// The coordinator at `host`, a name or address with a port.
    pub fn new(host: &str, credentials: &Credentials) -> Result<Self> {
        let client = credentials.client()?.connect_timeout(Duration::from_secs(5)).read_timeout(REQUEST);
        let client = client.tcp_keepalive(Duration::from_secs(5)).build();
        let client = client.map_err(|e| Error::Usage(format!("no connection can be made: {}", explained(&e))))?;
        Ok(Self { client, url: format!("https://{host}/v1") })
    }

    async fn checked(&self, sent: std::result::Result<Response, reqwest::Error>) -> Answer<Response> {
        let response = sent.map_err(|e| Failure::Again(explained(&e)))?;
        match response.status() {
            status if status.is_success() => Ok(response),
            status @ (StatusCode::CONFLICT | StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST) => {
                let reason = response.text().await.unwrap_or_default();
                Err(Failure::Refused(if reason.is_empty() { status.to_string() } else { reason }))
            }
            status => Err(Failure::Again(format!("the coordinator answered {status}"))),
        }
    }

    /// Sends a message, and reads the answer.
    pub async fn ask<T: DeserializeOwned>(&self, what: &str, message: &impl Serialize) -> Answer<T> {
        let bytes = self.post(what, message).await?.bytes().await.map_err(Failure::again)?;
        postcard::from_bytes(&bytes).map_err(|e| Failure::Refused(format!("its answer cannot be read: {e}")))
    }

    /// Sends a message that has no answer.
    pub async fn tell(&self, what: &str, message: &impl Serialize) -> Answer<()> {
        self.post(what, message).await.map(drop)
    }

    async fn post(&self, what: &str, message: &impl Serialize) -> Answer<Response> {
        let body = postcard::to_stdvec(message).map_err(Failure::again)?;
        self.checked(self.client.post(format!("{}/{what}", self.url)).body(body).send().await).await
    }

    /// Fetches weights, each shard checked by its hash. A shard that is cut off goes on where it was.
    pub async fn weights(&self, manifest: &Manifest) -> Answer<ModelSnapshot> {
        let mut parts: Vec<(Described, Vec<u8>)> = Vec::with_capacity(manifest.shards.len());
        for shard in &manifest.shards {
            parts.push((shard.tensor.clone(), self.shard(&shard.hash, shard.len as usize).await?));
        }
        ModelSnapshot::from_parts(manifest.version, parts).map_err(|e| Failure::Refused(e.to_string()))
    }

    async fn shard(&self, hash: &str, len: usize) -> Answer<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut last = Failure::Again(String::new());
        for _ in 0..SHARD_TRIES {
            match self.rest_of_shard(hash, len, &mut bytes).await {
                Ok(()) if blake3::hash(&bytes).to_hex().as_str() == hash => return Ok(bytes),
                Ok(()) => {
                    last = Failure::Again(format!("shard {hash} has other bytes than its name says"));
                    bytes.clear();
                }
                Err(failure) => last = failure,
            }
        }
        Err(last)
    }

    async fn rest_of_shard(&self, hash: &str, len: usize, bytes: &mut Vec<u8>) -> Answer<()> {
        let mut request = self.client.get(format!("{}/shards/{hash}", self.url));
        if !bytes.is_empty() {
            request = request.header(RANGE, format!("bytes={}-", bytes.len()));
        }
        let mut response = self.checked(request.send().await).await?;
        if response.status() != StatusCode::PARTIAL_CONTENT {
            bytes.clear();
        }
        while let Some(chunk) = response.chunk().await.map_err(Failure::again)? {
            bytes.extend_from_slice(&chunk);
            if bytes.len() > len {
                return Err(Failure::Again(format!("shard {hash} is longer than {len} bytes")));
            }
        }
        Ok(())
    }
}
