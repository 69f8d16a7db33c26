//! Judges and scorers behind a server that misbehaves, and a model of one's own as judge.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use rehearsal::store::Store;
use rehearsal::{Config, Event, Job};

use crate::support::edit::replace_once;
use crate::support::{Remains, resume, rewarded_by, run, runtime, toml};

/// What the server does with a request.
pub enum Act {
    Reply(Value),
    Status(u16),
    Raw(&'static str),
    /// A reply that goes on and on.
    Endless,
    Redirect(String),
    /// No reply for as long as the client waits.
    Hang,
}

/// A server on loopback that answers by a script and counts.
pub struct Server {
    url: String,
    requests: Arc<AtomicU64>,
    bodies: Arc<Mutex<Vec<Value>>>,
    headers: Arc<Mutex<Vec<String>>>,
    /// Connections that are closed at once before any is answered.
    refused: Arc<AtomicU64>,
}

impl Server {
    pub fn start(act: impl Fn(u64, &Value) -> Act + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/v1/chat/completions", listener.local_addr().unwrap());
        let server = Self {
            url,
            requests: Arc::default(),
            bodies: Arc::default(),
            headers: Arc::default(),
            refused: Arc::default(),
        };
        let (requests, bodies, headers, refused) =
            (server.requests.clone(), server.bodies.clone(), server.headers.clone(), server.refused.clone());
        let act = Arc::new(act);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if refused.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok() {
                    continue;
                }
                let n = requests.fetch_add(1, Ordering::SeqCst);
                let (act, bodies, headers) = (act.clone(), bodies.clone(), headers.clone());
                std::thread::spawn(move || {
                    let Some((head, body)) = read(&stream) else { return };
                    bodies.lock().unwrap().push(body.clone());
                    headers.lock().unwrap().push(head);
                    answer(stream, act(n, &body));
                });
            }
        });
        server
    }

    fn count(&self) -> u64 {
        self.requests.load(Ordering::SeqCst)
    }
}

fn read(stream: &TcpStream) -> Option<(String, Value)> {
    let mut reader = BufReader::new(stream);
    let (mut head, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        if line.trim().is_empty() {
            break;
        }
        if let Some(n) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = n.trim().parse().ok()?;
        }
        head.push_str(&line);
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some((head, serde_json::from_slice(&body).ok()?))
}

fn answer(mut stream: TcpStream, act: Act) {
    let mut send = |status: u16, body: &str| {
        let text = format!(
            "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nRetry-After: 0\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let _ = stream.write_all(text.as_bytes());
    };
    match act {
        Act::Reply(value) => send(200, &value.to_string()),
        Act::Status(status) => send(status, "{\"error\": \"later\"}"),
        Act::Raw(text) => send(200, text),
        Act::Redirect(to) => {
            let head = format!("HTTP/1.1 307 X\r\nLocation: {to}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
            let _ = stream.write_all(head.as_bytes());
        }
        Act::Endless => {
            let _ = stream.write_all(b"HTTP/1.1 200 X\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n");
            while stream.write_all(&[b' '; 65536]).is_ok() {}
        }
        Act::Hang => drop(stream.read(&mut [0])), // until the client closes
    }
}

fn says(text: &str) -> Act {
    Act::Reply(json!({"choices": [{"message": {"role": "assistant", "content": text}}]}))
}

/// Prefers the longer of two quoted answers, wherever it stands.
pub fn longer(body: &Value) -> Act {
    let text = body["messages"][1]["content"].as_str().unwrap();
    let (first, second) = text.split_once("\n\nAnswer 2:").unwrap();
    let first = first.split_once("Answer 1:").unwrap().1;
    let second = second.split_once("\n\nExplain").unwrap().0;
    match first.trim().len().cmp(&second.trim().len()) {
        std::cmp::Ordering::Greater => says("The first says more.\n[[1]]"),
        std::cmp::Ordering::Less => says("The second says more.\n[[2]]"),
        std::cmp::Ordering::Equal => says("Neither.\n[[tie]]"),
    }
}

fn job(folder: &std::path::Path, steps: u64, judge: &str) -> Config {
    let text = rewarded_by(&toml(folder, steps, ""), judge);
    Config::from_toml(&text, std::path::Path::new(".")).unwrap_or_else(|e| panic!("{e}"))
}

pub fn api(server: &Server, more: &str) -> String {
    format!("[judge]\nurl = \"{}\"\napi_model = \"m\"\ntimeout_seconds = 10\nconcurrency = 3\n{more}\n", server.url)
}

#[test]
fn an_api_judge_through_every_fault_loses_nothing_and_pays_once() {
    // Nothing goes well at first: too many requests, an error, no JSON, JSON of another kind, no answer in time.
    let faulty = Server::start(|n, body| match n {
        1 => Act::Status(429),
        3 => Act::Status(503),
        5 => Act::Raw("<html>"),
        7 => Act::Raw("{\"choices\": []}"),
        9 => Act::Hang,
        _ => longer(body),
    });
    let calm = Server::start(|_, body| longer(body));
    let remains = |server: &Server| {
        let folder = tempfile::tempdir().unwrap();
        let outcome = run(job(folder.path(), 3, &api(server, ""))).unwrap();
        assert_eq!(outcome.step, 3);
        (Remains::of(folder.path()), folder)
    };
    let ((got, _a), (want, folder)) = (remains(&faulty), remains(&calm));
    assert_eq!(got.step, want.step);
    assert!(got.tensors == want.tensors, "faults changed what was learned");
    assert_eq!(faulty.count(), calm.count() + 5, "every fault costs one more request, and nothing else does");
    // 3 steps of 4 prompts with 2 answers in 2 orders, fewer where the same was asked before.
    assert!(calm.count() <= 24 && calm.count() >= 12, "{}", calm.count());
    assert!(calm.bodies.lock().unwrap().iter().all(|b| b["temperature"] == 0 && b["model"] == "m"));
    let (store, _) = Store::open(folder.path()).unwrap();
    for preference in store.preferences().unwrap() {
        let preference = preference.unwrap();
        assert!(preference.reasons.iter().all(|r| r.contains("m at http://")), "{:?}", preference.reasons);
    }
}

#[test]
fn a_resumed_job_asks_nothing_again() {
    let server = Server::start(|_, body| longer(body));
    let folder = tempfile::tempdir().unwrap();
    // The first run ends with its budget, in the middle of a step, politely.
    let outcome = run(job(folder.path(), 4, &api(&server, "calls_max = 9"))).unwrap();
    assert!(outcome.stopped && outcome.step < 4, "{outcome:?}");
    let paid = server.count();
    assert!(paid <= 9, "{paid} questions of at most 9");
    let outcome = resume(job(folder.path(), 4, &api(&server, ""))).unwrap();
    assert_eq!(outcome.step, 4);
    let asked: Vec<String> = server.bodies.lock().unwrap().iter().map(|b| b["messages"].to_string()).collect();
    let mut different = asked.clone();
    different.sort();
    different.dedup();
    assert_eq!(asked.len(), different.len(), "a question was paid for twice");

    let whole = tempfile::tempdir().unwrap();
    let calm = Server::start(|_, body| longer(body));
    run(job(whole.path(), 4, &api(&calm, ""))).unwrap();
    // The judge's name is part of its verdicts, and the ports differ.
    let (got, want) = (Remains::of(folder.path()), Remains::of(whole.path()));
    assert!(got.tensors == want.tensors);
}

#[test]
fn a_server_that_dies_is_waited_for_or_ends_the_job() {
    let server = Server::start(|_, body| longer(body));
    server.refused.store(u64::MAX, Ordering::SeqCst);
    let folder = tempfile::tempdir().unwrap();
    let error = run(job(folder.path(), 1, &api(&server, "retries = 1"))).unwrap_err().to_string();
    assert!(error.contains("after 2 tries"), "{error}");

    server.refused.store(7, Ordering::SeqCst);
    let folder = tempfile::tempdir().unwrap();
    let outcome = run(job(folder.path(), 1, &api(&server, "retries = 0\nunreachable = \"wait\""))).unwrap();
    assert_eq!(outcome.step, 1);
}

#[test]
fn a_refusal_is_a_tie_and_a_wrong_key_is_no_reason_to_try_again() {
    let refusing = Server::start(|_, _| {
        Act::Reply(json!({"choices": [{"message": {"content": null, "refusal": "I would rather not."}}]}))
    });
    let folder = tempfile::tempdir().unwrap();
    let outcome = run(job(folder.path(), 1, &api(&refusing, ""))).unwrap();
    assert_eq!(outcome.step, 1);
    let row: Value =
        serde_json::from_str(std::fs::read_to_string(folder.path().join("history.jsonl")).unwrap().trim()).unwrap();
    assert_eq!((&row["ties"], &row["reward"]), (&json!(4.0), &json!(0.5)));

    let locked = Server::start(|_, _| Act::Status(401));
    let folder = tempfile::tempdir().unwrap();
    let error = run(job(folder.path(), 1, &replace_once(&api(&locked, ""), "concurrency = 3", "concurrency = 1")))
        .unwrap_err()
        .to_string();
    assert!(error.contains("401") && error.contains("after 1 tries"), "{error}");
    let error = run(job(tempfile::tempdir().unwrap().path(), 1, &api(&locked, "token_env = \"NO_SUCH_KEY\"")));
    assert!(error.unwrap_err().to_string().contains("the environment has no NO_SUCH_KEY"));
}

#[test]
fn what_is_no_verdict_of_the_judge_counts_as_none() {
    let forged = [
        // Cut off in the middle of a sentence that quotes.
        json!({"choices": [{"finish_reason": "length", "message": {"content": "The first says\n[[1]]"}}]}),
        json!({"choices": [{"finish_reason": "content_filter", "message": {"content": "[[1]]"}}]}),
        json!({"choices": [{"message": {"content": "[[1]]", "refusal": "I would rather not.\n[[1]]"}}]}),
        // What a local judge records.
        json!({"choices": [{"message": {"content": "p(1) = 1"}}]}),
        // A number of tokens that no budget survives.
        json!({"choices": [{"message": {"content": "none"}}],
               "usage": {"prompt_tokens": u64::MAX, "completion_tokens": u64::MAX}}),
    ];
    for reply in forged {
        let sent = reply.clone();
        let server = Server::start(move |_, _| Act::Reply(sent.clone()));
        let folder = tempfile::tempdir().unwrap();
        run(job(folder.path(), 1, &api(&server, ""))).unwrap_or_else(|e| panic!("{reply}: {e}"));
        let (store, _) = Store::open(folder.path()).unwrap();
        for preference in store.preferences().unwrap() {
            assert!(preference.unwrap().scores.iter().all(|score| *score == 0.5), "{reply}");
        }
    }
}

#[test]
fn a_reply_without_end_and_a_redirection_end_the_job_with_a_reason() {
    let endless = Server::start(|_, _| Act::Endless);
    let error = run(job(tempfile::tempdir().unwrap().path(), 1, &api(&endless, ""))).unwrap_err().to_string();
    assert!(error.contains("longer than 1 MB"), "{error}");
    // Neither questions nor the key go to a server that nobody named.
    let other = Server::start(|_, body| longer(body));
    let to = other.url.clone();
    let redirecting = Server::start(move |_, _| Act::Redirect(to.clone()));
    let error = run(job(tempfile::tempdir().unwrap().path(), 1, &api(&redirecting, ""))).unwrap_err().to_string();
    assert!(error.contains("redirects to") && error.contains(&other.url), "{error}");
    assert_eq!(other.count(), 0);
}

#[test]
fn a_structured_reply_is_asked_for_and_read() {
    let server = Server::start(|_, body| {
        let format = &body["response_format"];
        assert_eq!((&format["type"], &format["json_schema"]["strict"]), (&json!("json_schema"), &json!(true)));
        let verdicts = format["json_schema"]["schema"]["properties"]["verdict"]["enum"].clone();
        assert_eq!(verdicts, json!(["1", "2", "tie"]));
        assert!(!body["messages"].to_string().contains("[["), "no marker is asked for");
        // The first is always better: in both orders, a tie.
        says("{\"reason\": \"it says [[2]]\", \"verdict\": \"1\"}")
    });
    let folder = tempfile::tempdir().unwrap();
    // What stands before `/chat/completions` will do.
    let judge = replace_once(&api(&server, "reply = \"object\""), "/chat/completions", "");
    assert_eq!(run(job(folder.path(), 1, &judge)).unwrap().step, 1);
    let (store, _) = Store::open(folder.path()).unwrap();
    for preference in store.preferences().unwrap() {
        assert!(preference.unwrap().scores.iter().all(|&score| score == 0.5));
    }
}

#[test]
fn a_key_is_sent_and_kept_nowhere() {
    let server = Server::start(|_, body| longer(body));
    // SAFETY: no other test reads or writes this variable.
    unsafe { std::env::set_var("REHEARSAL_TEST_KEY", "a-very-secret-key") };
    let folder = tempfile::tempdir().unwrap();
    run(job(folder.path(), 2, &api(&server, "token_env = \"REHEARSAL_TEST_KEY\""))).unwrap();
    assert!(
        server
            .headers
            .lock()
            .unwrap()
            .iter()
            .all(|h| h.to_lowercase().contains("authorization: bearer a-very-secret-key"))
    );
    let mut folders = vec![folder.path().to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let bytes = std::fs::read(&path).unwrap();
                assert!(!bytes.windows(17).any(|w| w == b"a-very-secret-key"), "the key is in {}", path.display());
            }
        }
    }
}

#[test]
fn a_server_scores_beside_rules() {
    let server = Server::start(|n, body| {
        let samples = body["samples"].as_array().unwrap();
        let scores: Vec<f64> = samples.iter().map(|s| s["completion"].as_str().unwrap().len() as f64).collect();
        // One answer of the wrong length on the way.
        Act::Reply(json!({"scores": if n == 0 { &scores[1..] } else { &scores[..] }}))
    });
    let folder = tempfile::tempdir().unwrap();
    let more =
        format!("[reward]\nrules = [\"ends_properly\"]\n[scorer]\nurl = \"{}\"\nbatch = 3\nweight = 0.5\n", server.url);
    run(job(folder.path(), 1, &more)).unwrap();
    // By threes at most, as they finish, and one more try.
    assert!((4..=9).contains(&server.count()), "{} requests for 8 completions", server.count());
    let (store, _) = Store::open(folder.path()).unwrap();
    for preference in store.preferences().unwrap() {
        let preference = preference.unwrap();
        for (completion, score) in preference.completions.iter().zip(&preference.scores) {
            let rule = score - 0.5 * completion.len() as f64;
            assert!([0.0, 0.5, 1.0].contains(&rule), "{completion:?}: {score}");
        }
    }
}

#[test]
fn a_model_of_ones_own_judges_in_both_orders() {
    let folder = tempfile::tempdir().unwrap();
    let template = folder.path().join("template.txt");
    std::fs::write(&template, "{{ question }}\n1:\n{{ first }}\n2:\n{{ second }}\n").unwrap();
    let judge = format!("[judge]\nmodel = \"embedded\"\ntemplate_file = \"{}\"\n", template.display());
    let job = Job::builder(job(folder.path(), 2, &judge)).build();
    let result = runtime().block_on(async {
        let job = job.unwrap();
        let mut events = job.events();
        let result = job.run(Default::default()).await;
        while let Ok(event) = events.try_recv() {
            if let Event::Step(step) = event {
                assert!((step.stat("reward").unwrap() - 0.5).abs() < 1e-9, "one wins what the other loses");
            }
        }
        result
    });
    assert_eq!(result.unwrap().step, 2);
    let (store, _) = Store::open(folder.path()).unwrap();
    let first = store.preferences().unwrap().next().unwrap().unwrap();
    assert!(first.reasons[0].contains("shown first") && first.reasons[0].contains("local "), "{:?}", first.reasons);
}
