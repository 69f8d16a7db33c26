//! A server and nodes of all kinds on loopback, with real certificates.

use std::sync::Arc;
use std::time::Duration;

use rehearsal_actors::{ModelFiles, ModelSnapshot};
use rehearsal_lm::generate::{Completion, Finish, Options, Request, Sampling};
use tokio::sync::mpsc::unbounded_channel;

use super::client::{Answer, Coordinator, Failure};
use super::leases::{Leases, Local, News};
use super::protocol::{Beat, Beaten, Bits, Delivery, Join, Joined, Lease};
use super::server::{Base, Server, Shared, bind, serve};
use super::settings::Credentials;
use super::weights::Weights;
use crate::make_certificates;

struct Fixture {
    shared: Arc<Shared>,
    server: Server,
    folder: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        make_certificates(&folder.path().join("c"), &[]).unwrap();
        let model = crate::embedded::model().unwrap();
        let start = ModelSnapshot { tensors: model.parameters.clone(), ..ModelSnapshot::default() };
        let lease = Duration::from_secs(10);
        let (files, start) = (ModelFiles::of(&model), Weights::new(&start).unwrap());
        let base = Base { files, start, bf16: false, lora: None, lease };
        let shared = Arc::new(Shared::new(Leases::new(lease, 2, 1000), base));
        let bound = bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let server = serve(bound, &credentials(&folder, "c", "coordinator"), shared.clone()).unwrap();
        Self { shared, server, folder }
    }

    fn node(&self, directory: &str) -> Coordinator {
        let host = self.server.address.to_string();
        Coordinator::new(&host, &credentials(&self.folder, directory, "node")).unwrap()
    }
}

fn credentials(folder: &tempfile::TempDir, directory: &str, who: &str) -> Credentials {
    let file = |name: String| folder.path().join(directory).join(name);
    Credentials {
        authority: file("authority.pem".into()),
        certificate: file(format!("{who}.pem")),
        key: file(format!("{who}.key")),
    }
}

async fn join(node: &Coordinator, name: &str, bits: Bits) -> Answer<Joined> {
    node.ask("join", &Join { name: name.into(), bits }).await
}

fn refused<T>(answer: Answer<T>) -> String {
    match answer {
        Err(Failure::Refused(reason)) => reason,
        Err(Failure::Again(reason)) => panic!("it may try again: {reason}"),
        Ok(_) => panic!("it was answered"),
    }
}

#[tokio::test]
async fn a_node_of_another_build_protocol_or_device_is_refused_by_name() {
    let fixture = Fixture::new();
    let node = fixture.node("c");
    for (bits, what) in [
        (Bits { protocol: 99, ..Bits::here() }, "the node has protocol 99 and the coordinator 1"),
        (Bits { build: "0.0.1".into(), ..Bits::here() }, "the node has version 0.0.1 and the coordinator"),
        (Bits { device: "cuda H100".into(), ..Bits::here() }, "the node has device cuda H100 and the coordinator cpu"),
    ] {
        let reason = refused(join(&node, "old", bits).await);
        assert!(reason.starts_with(what), "{reason}");
    }
    assert_eq!(fixture.shared.leases().nodes(), 0);
}

#[tokio::test]
async fn a_certificate_of_another_authority_is_refused_by_both_sides() {
    let fixture = Fixture::new();
    make_certificates(&fixture.folder.path().join("other"), &[]).unwrap();
    let strange = join(&fixture.node("other"), "stranger", Bits::here()).await;
    assert!(matches!(strange, Err(Failure::Again(_))), "it does not trust the coordinator");
    // One that trusts the coordinator, with a certificate of its own authority.
    let mut credentials = credentials(&fixture.folder, "other", "node");
    credentials.authority = fixture.folder.path().join("c/authority.pem");
    let node = Coordinator::new(&fixture.server.address.to_string(), &credentials).unwrap();
    assert!(matches!(join(&node, "stranger", Bits::here()).await, Err(Failure::Again(_))));
    assert_eq!(fixture.shared.leases().nodes(), 0);
}

#[tokio::test]
async fn weights_are_checked_and_wrong_completions_shut_a_node_out() {
    let fixture = Fixture::new();
    let node = fixture.node("c");
    let Joined { session, start, .. } = join(&node, "liar", Bits::here()).await.unwrap_or_else(|_| panic!());
    let fetched = node.weights(&start).await.unwrap_or_else(|_| panic!("weights"));
    assert_eq!(fetched.tensors.len(), start.shards.len());
    let mut damaged = start.clone();
    damaged.shards[0].hash = start.shards[1].hash.clone();
    damaged.shards[0].len = start.shards[1].len;
    if damaged.shards[0].tensor.shape != start.shards[1].tensor.shape {
        assert!(node.weights(&damaged).await.is_err(), "bytes of another shape");
    }
    damaged.shards[0].hash = "0".repeat(64);
    assert!(node.weights(&damaged).await.is_err(), "no such shard");

    let options = Options {
        sampling: Sampling::default(),
        max_new_tokens: 4,
        min_new_tokens: 0,
        eos: vec![2],
        stop: Vec::new(),
        seed: 1,
        batch: 4,
    };
    let prompt = Arc::new(vec![5, 6]);
    let requests = (0..4).map(|id| Request { id, prompt: prompt.clone() }).collect();
    let (finished, mut received) = unbounded_channel();
    let weights = Arc::new(Weights::new(&fetched).unwrap());
    let work = fixture.shared.change(|leases| leases.add(weights, options, requests, finished));
    let lease = node.ask::<Option<Lease>>("lease", &session).await.unwrap_or_else(|_| panic!()).unwrap();
    assert_eq!(lease.prompts, [(vec![5, 6], vec![0, 1])]);
    let beat = Beat { session, lease: Some(lease.id) };
    assert!(node.ask::<Beaten>("beat", &beat).await.unwrap_or_else(|_| panic!()).holds);
    let completion = |id, token| Completion { id, tokens: vec![token], logprobs: vec![-1.0], finish: Finish::Length };
    let completions = vec![completion(0, 7), completion(1, 7)];
    node.tell("deliver", &Delivery { session, lease: lease.id, completions }).await.unwrap_or_else(|_| panic!());
    // The coordinator computes something else.
    fixture.shared.change(|leases| {
        assert_eq!(leases.take_local(work, Local::Checks).len(), 1);
        leases.deliver_local(work, completion(0, 8));
    });
    assert_eq!(received.recv().await.unwrap().tokens, [8]);
    let news = fixture.shared.leases().take_news();
    let reason = "it computed other bits for completion 0".to_string();
    assert_eq!(news[1..], [News::Excluded { node: "liar".into(), reason: reason.clone() }]);
    assert_eq!(refused(join(&node, "liar", Bits::here()).await), reason);
    let unknown = node.ask::<Option<Lease>>("lease", &session).await;
    assert!(matches!(unknown, Err(Failure::Again(_))));
    let other = fixture.node("c");
    assert!(join(&other, "honest", Bits::here()).await.is_ok(), "another node with the same certificate");
}

#[tokio::test]
async fn nonsense_is_answered_and_ends_nothing() {
    let fixture = Fixture::new();
    let node = fixture.node("c");
    for path in ["join", "lease", "beat", "deliver", "leave"] {
        let answer = node.ask::<Beaten>(path, &"nonsense".repeat(3)).await;
        assert!(answer.is_err(), "{path}");
    }
    let long = node.ask::<Joined>("join", &vec![7u8; 5 << 20]).await;
    assert!(long.is_err(), "more than a request may have");
    assert!(join(&node, "later", Bits::here()).await.is_ok());
}

/// What requests and shards cost on loopback: `cargo test --features full --lib nodes::tests::cost -- --ignored --nocapture`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "it measures"]
async fn cost() {
    use std::time::Instant;
    let fixture = Fixture::new();
    let node = fixture.node("c");
    let Joined { session, .. } = join(&node, "fast", Bits::here()).await.unwrap_or_else(|_| panic!());
    let beat = Beat { session, lease: None };
    assert!(node.ask::<Beaten>("beat", &beat).await.is_ok());
    let start = Instant::now();
    for _ in 0..2000 {
        assert!(node.ask::<Beaten>("beat", &beat).await.is_ok());
    }
    println!("a request and its answer: {:.0} µs", start.elapsed().as_secs_f64() / 2000.0 * 1e6);

    let n = 16usize << 20;
    let tensor = candle_core::Tensor::rand(0f32, 1.0, n, &candle_core::Device::Cpu).unwrap();
    let tensors = [("weights.w".to_string(), tensor)].into();
    let snapshot = ModelSnapshot { version: 1, tensors, ..ModelSnapshot::default() };
    let start = Instant::now();
    let weights = Arc::new(Weights::new(&snapshot).unwrap());
    let bytes = 4.0 * n as f64 / 1e6;
    println!("copied and hashed: {:.0} MB/s", bytes / start.elapsed().as_secs_f64());
    let manifest = weights.manifest.clone();
    let options = Options {
        sampling: Sampling::default(),
        max_new_tokens: 64,
        min_new_tokens: 0,
        eos: vec![2],
        stop: Vec::new(),
        seed: 1,
        batch: 4,
    };
    let prompt = Arc::new((0..64).collect::<Vec<u32>>());
    let requests = (0..20_000).map(|id| Request { id, prompt: prompt.clone() }).collect();
    let (finished, _received) = unbounded_channel();
    let work = fixture.shared.change(|leases| leases.add(weights, options, requests, finished));
    let start = Instant::now();
    assert!(node.weights(&manifest).await.is_ok());
    println!("fetched and checked: {:.0} MB/s", bytes / start.elapsed().as_secs_f64());

    let start = Instant::now();
    let mut leases = 0;
    while leases < 2000 {
        let lease = node.ask::<Option<Lease>>("lease", &session).await.unwrap_or_else(|_| panic!());
        let Some(lease) = lease else { break };
        let completion =
            |id: u64| Completion { id, tokens: vec![7; 64], logprobs: vec![-1.0; 64], finish: Finish::Length };
        let completions = lease.prompts.iter().flat_map(|(_, ids)| ids).map(|id| completion(*id)).collect();
        node.tell("deliver", &Delivery { session, lease: lease.id, completions }).await.unwrap_or_else(|_| panic!());
        leases += 1;
        let checks = fixture.shared.leases().take_local(work, Local::Checks);
        for request in checks {
            fixture.shared.change(|leases| leases.deliver_local(work, completion(request.id)));
        }
    }
    println!(
        "leases of two completions taken and delivered: {:.0} a second",
        f64::from(leases) / start.elapsed().as_secs_f64()
    );
}
