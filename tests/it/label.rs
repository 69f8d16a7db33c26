//! People who label: a session in a real Chromium, the same by HTTP, and a job that waits for them.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use fantoccini::Locator;
use rehearsal::store::{Preference, Store};
use serde_json::{Value, json};

use crate::support::browser::{Browser, Page, Server};
use crate::support::{PATIENCE, job_file, program, rehearsal, rewarded_by, runtime, stderr};

fn labelling(directory: &Path, more: &[&str]) -> Server {
    let mut command = program();
    command.args(["label", directory.to_str().unwrap(), "--listen", "127.0.0.1:0"]).args(more);
    Server::start(command, "labelling at ", &[';'])
}

fn get(url: &str, path: &str) -> Value {
    ureq::get(&format!("{url}{path}")).call().unwrap().body_mut().read_json().unwrap()
}

fn post(url: &str, path: &str, body: Value) -> Result<Value, ureq::Error> {
    ureq::post(&format!("{url}{path}")).send_json(body)?.body_mut().read_json()
}

fn verdicts(directory: &Path) -> Vec<Preference> {
    let (store, _) = Store::open(directory).unwrap();
    store.preferences().unwrap().map(Result::unwrap).collect()
}

/// Markup that would show if the page took it for markup.
const HOSTILE: &str =
    "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script><b>bold</b>";

fn items(folder: &Path) -> std::path::PathBuf {
    let rows = [
        json!({"prompt": "What is the fox like?", "completions": ["It is quick.", "Go away.", "A fox.", HOSTILE]}),
        json!({"prompt": [{"role": "user", "content": "Who?"}], "chosen": [{"role": "assistant", "content": "The dog."}],
               "rejected": [{"role": "assistant", "content": "Whatever."}]}),
        json!({"prompt": "What does the dog do?", "completions": ["It sleeps.", "It eats.", "No."]}),
        json!({"prompt": "Say hello."}),
    ];
    let file = folder.join("items.jsonl");
    std::fs::write(&file, rows.map(|row| row.to_string()).join("\n")).unwrap();
    file
}

/// A person at the label page.
struct Person(Page);

impl std::ops::Deref for Person {
    type Target = Page;

    fn deref(&self) -> &Page {
        &self.0
    }
}

impl Person {
    async fn says_who(&self, name: &str) {
        self.0.fills("#name", &format!("{name}{ENTER}")).await;
    }

    /// The letter under which an answer is shown.
    async fn letter_of(&self, answer: &str) -> String {
        for row in self.0.0.find_all(Locator::Css("#answers li")).await.unwrap() {
            if row.find(Locator::Css(".text")).await.unwrap().text().await.unwrap() == answer {
                return row.find(Locator::Css(".letter")).await.unwrap().text().await.unwrap().to_lowercase();
            }
        }
        panic!("{answer:?} is not shown");
    }

    /// Types answers from best to worst; `=` stands before a tie.
    async fn ranks(&self, answers: &[&str]) {
        for answer in answers {
            let (tie, text) = answer.strip_prefix('=').map_or(("", *answer), |text| ("=", text));
            let letter = self.letter_of(text).await;
            self.types(&format!("{tie}{letter}")).await;
        }
    }
}

const ENTER: &str = "\u{e007}";
const BACKSPACE: &str = "\u{e003}";

#[test]
fn people_rank_tie_undo_reload_and_write_in_a_real_browser() {
    let folder = tempfile::tempdir().unwrap();
    let (file, labels) = (items(folder.path()), folder.path().join("labels"));
    let server = labelling(&labels, &["--items", file.to_str().unwrap(), "--labels", "2"]);
    runtime().block_on(async {
        let Some(browser) = Browser::start().await else { return };
        let anna = Person(browser.page);
        anna.0.0.goto(&server.url).await.unwrap();
        anna.sees("#message", "Say who you are").await;
        anna.says_who("anna").await;
        anna.sees("#prompt", "What is the fox like?").await;
        anna.sees("#progress", "0 of 4 done · 0 by you").await;

        // What an answer contains is shown as it is, and does nothing.
        let letter = anna.letter_of(HOSTILE).await;
        assert_eq!(letter.len(), 1);
        assert!(anna.0.0.find_all(Locator::Css("#answers img, #answers script, #answers b")).await.unwrap().is_empty());
        assert_eq!(anna.0.0.title().await.unwrap(), "Which answer is better?");

        // A mistake is taken back key by key; a half-typed ranking survives a reload.
        anna.ranks(&["Go away."]).await;
        anna.types(BACKSPACE).await;
        anna.ranks(&["It is quick.", "A fox."]).await;
        let half = anna.text("#ranking").await;
        assert!(half.ends_with("> …"), "{half}");
        anna.0.0.refresh().await.unwrap();
        anna.sees("#ranking", &half).await;
        anna.types(ENTER).await; // not whole: nothing is sent
        anna.ranks(&["Go away.", &format!("={HOSTILE}")]).await;
        let ranking = anna.text("#ranking").await;
        assert_eq!((ranking.matches('>').count(), ranking.matches('=').count()), (2, 1), "{ranking}");
        anna.types(ENTER).await;
        anna.sees("#prompt", "Who?").await;
        anna.sees("#progress", "1 by you").await;

        // The last verdict is taken back and given anew.
        anna.types("u").await;
        anna.sees("#prompt", "What is the fox like?").await;
        anna.sees("#progress", "0 by you").await;
        anna.ranks(&["A fox.", "It is quick.", "Go away.", &format!("={HOSTILE}")]).await;
        anna.types(ENTER).await;
        anna.sees("#prompt", "Who?").await;
        anna.ranks(&["The dog.", "Whatever."]).await;
        anna.types(ENTER).await;
        anna.sees("#prompt", "What does the dog do?").await;
        anna.types("s").await; // she cannot tell
        anna.sees("#task", "Write the answer").await;
        let field = anna.0.0.find(Locator::Css("#text")).await.unwrap();
        field.send_keys("Hello, and welcome!").await.unwrap();
        anna.0.0.find(Locator::Css("#send")).await.unwrap().click().await.unwrap();
        anna.sees("#idle-text", "That was all").await;

        // The second labeller, with another opinion on the first item; by mouse this time.
        anna.says_who("ben").await;
        anna.sees("#prompt", "What is the fox like?").await;
        for answer in ["It is quick.", "A fox.", "Go away.", HOSTILE] {
            let letter = anna.letter_of(answer).await;
            let place = letter.as_bytes()[0] - b'a' + 1;
            let row = anna.0.0.find(Locator::Css(&format!("#answers li:nth-child({place})"))).await.unwrap();
            row.click().await.unwrap();
        }
        anna.0.0.find(Locator::Css("#send")).await.unwrap().click().await.unwrap();
        anna.sees("#prompt", "Who?").await;
        anna.ranks(&["The dog.", "Whatever."]).await;
        anna.types(ENTER).await;
        anna.sees("#prompt", "What does the dog do?").await;
        // 7 pairs, 5 alike: A fox/quick turned round and one tie broken.
        anna.sees("#progress", "κ anna/ben").await;
        anna.sees("#progress", "on 7 pairs").await;
        anna.0.0.close().await.unwrap();
    });
    server.kill();

    // Killed and started again without its file, it knows everything.
    let server = labelling(&labels, &["--labels", "2"]);
    let progress = get(&server.url, "api/progress");
    assert_eq!((&progress["done"], &progress["labellers"]), (&json!(2), &json!({"anna": 3, "ben": 2})), "{progress}");
    server.kill();

    let kept = verdicts(&labels);
    let of = |who: &str, step: u64| {
        let judge = format!("person:{who}");
        kept.iter().find(|p| p.judge == judge && p.step == step).unwrap_or_else(|| panic!("{who} on {step}"))
    };
    assert_eq!(kept.len(), 6);
    assert_eq!((of("anna", 0).ranks(), of("ben", 0).ranks()), (vec![2, 3, 1, 3], vec![1, 3, 2, 4]));
    assert_eq!(of("anna", 1).pair, Some((0, 1)));
    assert_eq!(of("anna", 2).scores, Vec::<f64>::new());
    assert_eq!(of("anna", 3).completions, ["Hello, and welcome!"]);
    let said = &of("anna", 0).exchanges[0];
    assert_eq!((said.shown.len(), said.reply.matches(" > ").count(), said.reply.matches(" = ").count()), (4, 2, 1));

    // And jobs learn from what they said.
    for (algorithm, trained) in [("reward_model", 4), ("sft", 1), ("dpo", 4)] {
        let text = format!(
            "[job]\ndirectory = \"{algorithm}\"\nalgorithm = \"{algorithm}\"\nsteps = 2\n[data]\ntrain = [\"labels\"]\n\
             batch_size = 2\n[evaluation]\nevery_steps = 0\n"
        );
        let file = folder.path().join(format!("{algorithm}.toml"));
        std::fs::write(&file, text).unwrap();
        let output = rehearsal(&["run", file.to_str().unwrap()]);
        assert!(output.status.success(), "{}", stderr(&output));
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(said.contains(&format!(", {trained} rows")), "{algorithm}: {said}");
    }
}

#[test]
fn the_page_lets_in_whom_it_should() {
    let folder = tempfile::tempdir().unwrap();
    let (file, labels) = (items(folder.path()), folder.path().join("labels"));
    let local = labelling(&labels, &["--items", file.to_str().unwrap()]);
    // Another site's name for this machine, and a form of another site.
    let status = |request: ureq::RequestBuilder<ureq::typestate::WithoutBody>| {
        request.config().http_status_as_error(false).build().call().unwrap().status().as_u16()
    };
    let next = format!("{}api/next?labeller=anna", local.url);
    assert_eq!(status(ureq::get(&next)), 200);
    assert_eq!(status(ureq::get(&next).header("Host", "evil.example")), 403);
    assert_eq!(status(ureq::get(&next).header("Sec-Fetch-Site", "cross-site")), 403);
    assert_eq!(status(ureq::get(&next).header("Sec-Fetch-Site", "same-origin")), 200);
    let said = json!({"labeller": "anna", "item": 0}).to_string();
    let form = ureq::post(&format!("{}api/label", local.url)).header("Content-Type", "text/plain").send(said);
    assert!(matches!(form, Err(ureq::Error::StatusCode(415))), "{form:?}");
    let page = ureq::get(&local.url).call().unwrap();
    let policy = page.headers()["content-security-policy"].to_str().unwrap();
    assert!(policy.starts_with("default-src 'none'; script-src 'self'"), "{policy}");
    // What makes no sense is refused with its reason, and nothing is kept.
    for (body, wanted) in [
        (json!({"labeller": "", "item": 0}), "say who you are"),
        (json!({"labeller": "anna", "item": 9}), "no longer in the queue"),
        (json!({"labeller": "anna", "item": 0, "ranks": [1, 2]}), "2 ranks for 4 completions"),
        (json!({"labeller": "anna", "item": 3, "text": " "}), "the text is empty"),
    ] {
        let mut answer = ureq::post(&format!("{}api/label", local.url))
            .config()
            .http_status_as_error(false)
            .build()
            .send_json(&body)
            .unwrap();
        let text = answer.body_mut().read_to_string().unwrap();
        assert!(answer.status() == 409 && text.contains(wanted), "{body}: {text}");
    }
    local.kill();
    assert!(verdicts(&labels).is_empty());
    let other = rehearsal(&["label", labels.to_str().unwrap(), "--items", labels.to_str().unwrap()]);
    assert!(!other.status.success(), "{}", stderr(&other));

    // Beyond this machine: only with the token that was shown.
    let mut command = program();
    command.args(["label", labels.to_str().unwrap(), "--listen", "0.0.0.0:0"]);
    let open = Server::start(command, "labelling at ", &[';']);
    let (url, token) = open.url.split_once("/#").unwrap();
    let next = format!("{url}/api/next?labeller=anna").replace("0.0.0.0", "127.0.0.1");
    assert_eq!(status(ureq::get(&next)), 403);
    assert_eq!(status(ureq::get(&next).header("Authorization", "Bearer 0123456789abcdef0123456789abcdef")), 403);
    assert_eq!(status(ureq::get(&next).header("Authorization", format!("Bearer {token}"))), 200);
}

#[test]
fn a_job_waits_for_people_and_asks_nothing_again_after_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    let people = "[people]\nlisten = \"127.0.0.1:0\"\n[evaluation]\nevery_steps = 0\n";
    let (file, directory) = job_file(folder.path(), 2, people);
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, rewarded_by(&text, "")).unwrap();
    let start = |args: &[&str]| {
        let mut command = program();
        command.args(args);
        Server::start(command, "waiting for people at ", &['\n'])
    };
    // Says that the first answer in the item's order is best; what was shown is returned.
    let say = |server: &Server| -> Option<Value> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let found = match ureq::get(&format!("{}api/next?labeller=anna", server.url)).call() {
                Ok(mut found) => found.body_mut().read_json::<Value>().unwrap(),
                Err(_) => return None, // the job is done
            };
            assert_eq!(found["live"], true);
            if let Some(id) = found["item"]["id"].as_u64() {
                let _ = post(&server.url, "api/label", json!({"labeller": "anna", "item": id, "ranks": [1, 2]}));
                return Some(found["item"]["completions"].clone());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("there was nothing to judge");
    };
    let mut judged = Vec::new();
    let server = start(&["run", file.to_str().unwrap()]);
    judged.extend(say(&server));
    judged.extend(say(&server));
    server.kill();
    let mut server = start(&["resume", directory.to_str().unwrap()]);
    while server.child.try_wait().unwrap().is_none() {
        judged.extend(say(&server));
    }
    assert!(server.child.wait().unwrap().success());
    let ledger = verdicts(&directory);
    assert_eq!((ledger.len(), judged.len()), (8, 8), "every prompt is judged once");
    for verdict in &ledger {
        assert_eq!((verdict.judge.as_str(), verdict.pair), ("people", Some((0, 1))));
        assert_eq!(verdict.exchanges[0].judge, "person:anna");
    }
    // A job that waits is stopped politely.
    let other = tempfile::tempdir().unwrap();
    let (again, directory) = job_file(other.path(), 2, people);
    let text = std::fs::read_to_string(&again).unwrap();
    std::fs::write(&again, rewarded_by(&text, "")).unwrap();
    let mut server = start(&["run", again.to_str().unwrap()]);
    say(&server);
    let signal = Command::new("kill").args(["-TERM", &server.child.id().to_string()]).status().unwrap();
    assert!(signal.success());
    assert_eq!(server.child.wait().unwrap().code(), Some(130));
    let (store, _) = Store::open(&directory).unwrap();
    assert!(store.latest_checkpoint().unwrap().0.is_some(), "the state is saved");
}
