//! What is fuzzed: everything that reads bytes which others wrote. A target may return errors; it may not panic, hang or take
//! memory that its input does not pay for. `tests/it/fuzz.rs` runs the same on the corpora, a little mutated.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use rehearsal::data::ledger;
use rehearsal::judge::{ApiJudge, ApiSettings, Endpoint, Judge, Prices, Question, QuestionKind, parse_verdict};
use rehearsal::label::{Access, Item, LabelQueue, LabelServer, LabelService, LedgerLabels, serve};
use rehearsal::lm::{ChatTemplate, Checkpoint, Files, Message};
use rehearsal::store::{Prompt, Store};
use rehearsal::{CancellationToken, Config};

/// Reads an input.
type Target = fn(&[u8]);

/// Every target by its name.
pub const TARGETS: [(&str, Target); 11] = [
    ("gguf", gguf),
    ("safetensors", safetensors),
    ("config_json", config_json),
    ("tokenizer_json", tokenizer_json),
    ("chat_template", chat_template),
    ("toml", toml),
    ("rows_jsonl", rows_jsonl),
    ("rows_parquet", rows_parquet),
    ("store_journal", store_journal),
    ("label_http", label_http),
    ("judge_reply", judge_reply),
];

/// Runs the target of a name.
pub fn run(name: &str, data: &[u8]) {
    let (_, target) = TARGETS.iter().find(|(known, _)| *known == name).expect("a target of that name");
    target(data);
}

thread_local! {
    static FOLDER: tempfile::TempDir = tempfile::tempdir().expect("a folder");
    /// A ledger that rows are imported into.
    static LEDGER: RefCell<(tempfile::TempDir, Store)> = RefCell::new({
        let folder = tempfile::tempdir().expect("a folder");
        let (store, _) = Store::open(folder.path()).expect("a store");
        (folder, store)
    });
}

/// Writes a file of a name into a folder of this thread.
fn file(name: &str, data: &[u8]) -> PathBuf {
    let path = FOLDER.with(|folder| folder.path().join(name));
    std::fs::write(&path, data).expect("space");
    path
}

/// The embedded model as the files of a directory.
struct Model {
    config: Vec<u8>,
    tokenizer: Vec<u8>,
    tokenizer_config: Vec<u8>,
    weights: Vec<u8>,
}

static MODEL: LazyLock<Model> = LazyLock::new(|| {
    let model = rehearsal::embedded::model().expect("the embedded model");
    let folder = tempfile::tempdir().expect("a folder");
    model
        .save(&model.parameters, folder.path(), "f32".parse::<rehearsal::WeightType>().expect("a type").into())
        .expect("space");
    let read = |name: &str| std::fs::read(folder.path().join(name)).expect("a file of the model");
    Model {
        config: read("config.json"),
        tokenizer: read("tokenizer.json"),
        tokenizer_config: read("tokenizer_config.json"),
        weights: read("model.safetensors"),
    }
});

impl Model {
    fn files(&self) -> Files<'_> {
        Files {
            config: &self.config,
            tokenizer: &self.tokenizer,
            tokenizer_config: &self.tokenizer_config,
            weights: &self.weights,
        }
    }
}

fn gguf(data: &[u8]) {
    let _ = Checkpoint::open(&file("model.gguf", data));
}

fn safetensors(data: &[u8]) {
    let _ = Checkpoint::from_files(Files { weights: data, ..MODEL.files() }, "model");
}

fn config_json(data: &[u8]) {
    let _ = Checkpoint::from_files(Files { config: data, ..MODEL.files() }, "model");
}

fn tokenizer_json(data: &[u8]) {
    if let Ok(model) = Checkpoint::from_files(Files { tokenizer: data, ..MODEL.files() }, "model") {
        let _ = model.text.encode("The fox <|im_end|> is quick.").map(|tokens| model.text.decode(&tokens));
    }
}

fn chat_template(data: &[u8]) {
    let Ok(template) = ChatTemplate::new(&String::from_utf8_lossy(data), "<s>", "</s>") else { return };
    let _ =
        template.with_day(20_000).render(&[Message::system("Be brief."), Message::user("Who? {{ bos_token }}")], true);
}

fn toml(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(config) = Config::from_toml(text, Path::new("/nowhere")) {
        let written = config.to_toml();
        Config::from_toml(&written, Path::new("/nowhere")).expect("what was written is read");
    }
}

fn rows(file: &Path) {
    LEDGER.with_borrow_mut(|(_, store)| drop(ledger::import(store, file, "fuzz")));
    let _ = rehearsal::data::prompts_of(file);
}

fn rows_jsonl(data: &[u8]) {
    rows(&file("rows.jsonl", data));
}

fn rows_parquet(data: &[u8]) {
    rows(&file("rows.parquet", data));
}

/// A store whose journal is what the input says.
fn store_journal(data: &[u8]) {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("store.journal"), data).expect("space");
    let Ok((store, _)) = Store::open(folder.path()) else { return };
    let _ = store.verify();
    if let Ok(preferences) = store.preferences() {
        preferences.for_each(drop);
    }
    let _ = store.latest_checkpoint();
    for step in 0..3 {
        let _ = (store.rollouts(step), store.scores(step));
    }
}

static RUNTIME: LazyLock<tokio::runtime::Runtime> = LazyLock::new(|| {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime")
});

static PAGE: LazyLock<(tempfile::TempDir, LabelServer)> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a folder");
    let (store, _) = Store::open(folder.path()).expect("a store");
    let item = Item { prompt: Prompt::Text("Who?".into()), completions: vec!["a".into(), "b".into()] };
    let (labels, known) = LedgerLabels::open(store, vec![item.clone()]).expect("a ledger");
    let mut queue = LabelQueue::new(1);
    queue.add(item, known.into_iter().next().unwrap_or_default()).expect("an item");
    let service = Arc::new(LabelService::new(queue, Box::new(labels)));
    let address = SocketAddr::from(([127, 0, 0, 1], 0));
    (folder, RUNTIME.block_on(serve(service, address, Access::Loopback, false)).expect("a server"))
});

/// Bytes to the label page; it answers others all the same.
fn label_http(data: &[u8]) {
    let address = PAGE.1.address;
    let mut stream = TcpStream::connect(address).expect("the server accepts");
    let _ = stream.write_all(data).and_then(|()| stream.shutdown(std::net::Shutdown::Write));
    let _ = stream.read_to_end(&mut Vec::new()); // it closes, for nothing more comes

    let mut stream = TcpStream::connect(address).expect("the server accepts");
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
    let head = format!("GET /api/progress HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).expect("the server reads");
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
}

/// A server that answers every request with the same bytes, and the judge that asks it.
struct Replies {
    body: Arc<Mutex<Vec<u8>>>,
    judge: ApiJudge,
}

static REPLIES: LazyLock<Replies> = LazyLock::new(|| {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}/v1/chat/completions", listener.local_addr().expect("an address"));
    let body: Arc<Mutex<Vec<u8>>> = Arc::default();
    let content = body.clone();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.read(&mut [0; 65536]);
            let body = content.lock().expect("a body").clone();
            let head = format!(
                "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
                body.len()
            );
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
        }
    });
    let endpoint =
        Endpoint { url, token_env: None, timeout: Duration::from_secs(2), retries: 0, wait: false, concurrency: 1 };
    let settings = ApiSettings { model: "m".into(), tokens_max: 64, prices: Prices::default(), structured: false };
    let judge = ApiJudge::new(settings, endpoint, CancellationToken::new()).expect("a judge");
    Replies { body, judge }
});

/// What a judge says, and what its server sends.
fn judge_reply(data: &[u8]) {
    let kinds = [QuestionKind::Pair, QuestionKind::Grade, QuestionKind::Ranking(3)];
    let text = String::from_utf8_lossy(data);
    for kind in kinds {
        if let Some(first) = parse_verdict(kind, &text).and_then(|verdict| verdict.first()) {
            assert!((0.0..=1.0).contains(&first), "{first}");
        }
    }
    *REPLIES.body.lock().expect("a body") = data.to_vec();
    let question = Question { system: String::new(), text: "Which?".into(), kind: QuestionKind::Pair };
    let _ = REPLIES.judge.ask(&[question]);
}
