//! The job viewer: in a real Chromium, by HTTP, on jobs that run and on those that do not.

use std::path::{Path, PathBuf};

use fantoccini::Locator;
use rehearsal::store::{OVERRULES, Preference, Prompt, Store};
use serde_json::{Value, json};

use crate::support::browser::{Browser, Server};
use crate::support::jobs::{ROLLOUTS, job};
use crate::support::{PATIENCE, program, rehearsal, runtime, stderr};

/// Markup that would show if the page took it for markup.
const HOSTILE: &str =
    "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script><b>bold</b>";

/// A viewer, its address without the token, and the token.
fn viewing(directories: &[&Path]) -> (Server, String, String) {
    let mut command = program();
    command.arg("view").args(directories).args(["--listen", "127.0.0.1:0"]);
    split(Server::start(command, "viewer at ", &[';']))
}

fn split(server: Server) -> (Server, String, String) {
    let (address, token) = server.url.split_once("/#").expect("a token in the URL");
    let (address, token) = (address.to_string(), token.to_string());
    (server, address, token)
}

fn finished_job(folder: &Path) -> PathBuf {
    let (file, directory) = job(folder, "online_dpo", 6, ROLLOUTS);
    let output = rehearsal(&["run", file.to_str().unwrap()]);
    assert!(output.status.success(), "{}", stderr(&output));
    directory
}

fn get(url: &str) -> Value {
    ureq::get(url).call().unwrap().body_mut().read_json().unwrap()
}

/// The status and body of a POST.
fn post(url: &str, headers: &[(&str, &str)], body: &Value) -> (u16, Value) {
    let agent = ureq::Agent::config_builder().http_status_as_error(false).build().new_agent();
    let request = headers.iter().fold(agent.post(url), |request, (name, value)| request.header(*name, *value));
    let mut response = request.send_json(body).unwrap();
    (response.status().as_u16(), response.body_mut().read_json().unwrap_or_default())
}

fn ledger(directory: &Path) -> Vec<Preference> {
    let (store, _) = Store::open(directory).unwrap();
    store.preferences().unwrap().map(Result::unwrap).collect()
}

/// Waits until a request has an answer that is wanted.
fn until(url: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        let value = get(url);
        if wanted(&value) {
            return value;
        }
        assert!(std::time::Instant::now() < deadline, "{value}");
        std::thread::sleep(std::time::Duration::from_millis(30));
    }
}

#[test]
fn a_person_reads_a_job_and_overrules_a_verdict_in_a_real_browser() {
    let folder = tempfile::tempdir().unwrap();
    let directory = finished_job(folder.path());
    // A ledger of texts that would like to be more.
    let hostile = folder.path().join("hostile");
    let rows = folder.path().join("rows.jsonl");
    std::fs::write(&rows, json!({"prompt": HOSTILE, "chosen": HOSTILE, "rejected": "no"}).to_string()).unwrap();
    let imported = rehearsal(&["import", hostile.to_str().unwrap(), rows.to_str().unwrap(), "--judge", HOSTILE]);
    assert!(imported.status.success(), "{}", stderr(&imported));
    let (server, address, _) = viewing(&[&directory, &hostile]);

    runtime().block_on(async {
        let Some(browser) = Browser::start().await else { return };
        let page = &browser.page;
        page.0.goto(&server.url).await.unwrap();

        // Curves: a chart for each number that the history has.
        page.sees("#jobs li:first-child", "online_dpo · step 6 of 6 · done").await;
        page.sees("#charts", "Reward").await;
        for title in ["KL to the reference", "Gradient weight of pairs", "Length of completions", "Seconds of a step"] {
            page.sees("#charts", title).await;
        }
        assert!(page.count("#charts svg path.line").await >= 12 && page.count("#charts svg path.band").await >= 2);
        assert!(page.count("#charts svg circle").await >= 2, "held-out rewards");

        // Answers, the newest first, and what won.
        page.types("2").await;
        page.sees("#found", "24 of 24 comparisons").await;
        page.sees("#list li:first-child", "step 5 #3").await;
        page.sees("#answer", "policy version").await;
        page.types("jj").await;
        page.sees("#answer", "step 5 #1").await;
        let (chosen, all) = (page.count("#answer .completion.chosen").await, page.count("#answer .completion").await);
        assert_eq!((chosen, all), (1, 4));
        assert_eq!(page.count("#answer .completion.rejected").await, 1);

        // Tokens with their log-probabilities.
        page.types("t").await;
        page.sees("#answer .completion .token", "").await;
        let token = page.0.wait().for_element(Locator::Css("#answer .completion .token")).await.unwrap();
        let title = token.attr("title").await.unwrap().unwrap();
        assert!(title.contains("policy -") && title.contains("reference -") && title.contains("ratio"), "{title}");

        // A filter, a search, and their end.
        page.fills("#filter [name=from_step]", "4").await;
        page.fills("#filter [name=to_step]", "4").await;
        page.sees("#found", "4 of 24 comparisons").await;
        for bound in ["from_step", "to_step"] {
            page.fills(&format!("#filter [name={bound}]"), "\u{e003}").await;
        }
        let asked = get(&format!("{address}/api/jobs/0/answers?sort=oldest&limit=1"))["answers"][0]["prompt"].clone();
        let asked = asked.as_str().unwrap();
        page.fills("#search", &asked.to_uppercase()).await;
        page.sees("#list li:first-child .prompt", asked).await;
        let found = page.count("#list li").await;
        assert!((1..24).contains(&found), "{found} records have the text {asked}");

        // The verdict is overruled: the worst is the best.
        page.sees("#answer .overrule", "Overrule").await;
        for (at, rank) in ["4", "3", "2", "1"].into_iter().enumerate() {
            page.fills(&format!("#answer .overrule label:nth-of-type({}) input", at + 1), rank).await;
        }
        page.fills("#answer .overrule input[placeholder]", "anna").await;
        page.clicks("#answer .overrule button").await;
        page.sees("#answer .overrule", "person:anna ranks A 4, B 3, C 2, D 1").await;
        page.sees("#list li:first-child", "overruled by person:anna").await;

        // Held-out answers before and after.
        page.0.find(Locator::Css("#tab-evaluations")).await.unwrap().click().await.unwrap();
        page.sees("#held-out .pair", "step 0").await;
        page.sees("#held-out .pair section:nth-child(2)", "step 6").await;

        // Texts stay texts.
        page.clicks("#jobs li:nth-child(2) .name").await;
        page.clicks("#tab-answers").await;
        page.fills("#search", "\u{e003}").await;
        page.sees("#found", "1 of 1 comparisons").await;
        page.sees("#answer .turn", "onerror").await;
        page.sees("#answer .completion.chosen .text", "<script>").await;
        assert_eq!(page.count("#answer img, #answer script, #list img, #list script, #answer .text b").await, 0);
        assert_eq!(page.0.title().await.unwrap(), "Rehearsal");
        browser.page.0.clone().close().await.unwrap();
    });
    drop(server);

    // The ledger keeps both, and what trains on it takes the person's.
    let records = ledger(&directory);
    let overruling: Vec<&Preference> = records.iter().filter(|p| p.overrules().is_some()).collect();
    if overruling.is_empty() {
        return; // no browser
    }
    assert_eq!((overruling.len(), records.len()), (1, 25));
    let by_person = overruling[0];
    assert_eq!((by_person.judge.as_str(), by_person.scores.as_slice()), ("person:anna", &[0.0, 1.0, 2.0, 3.0][..]));
    assert_eq!(by_person.pair, Some((3, 0)));
    let out = folder.path().join("pairs.jsonl");
    let exported = rehearsal(&["export", directory.to_str().unwrap(), "--ledger", out.to_str().unwrap()]);
    assert!(exported.status.success(), "{}", stderr(&exported));
    let rows: Vec<Value> =
        std::fs::read_to_string(&out).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of_person: Vec<&Value> = rows.iter().filter(|row| row["judge"] == "person:anna").collect();
    assert_eq!(of_person.len(), 1);
    assert_eq!(of_person[0]["chosen"], json!(by_person.completions[3]));
    let original = records.iter().find(|p| (p.step, p.index + OVERRULES) == (by_person.step, by_person.index)).unwrap();
    let same = |row: &&Value| row["step"] == json!(original.step) && row["prompt"] == prompt(original);
    assert_eq!(rows.iter().filter(same).filter(|row| row["judge"] != "person:anna").count(), 0, "{original:?}");
}

fn prompt(p: &Preference) -> Value {
    match &p.prompt {
        Prompt::Text(text) => json!(text),
        Prompt::Conversation(turns) => json!(turns),
    }
}

#[test]
fn a_running_job_is_paused_saved_and_stopped_from_its_page() {
    let folder = tempfile::tempdir().unwrap();
    let more = format!("{ROLLOUTS}[view]\nlisten = \"127.0.0.1:0\"\n").replace("every_steps = 2", "every_steps = 1000");
    let (file, directory) = job(folder.path(), "online_dpo", 100_000, &more);
    let mut command = program();
    command.args(["run", file.to_str().unwrap()]);
    let (mut server, address, token) = split(Server::start(command, "viewer at ", &[' ']));
    let jobs = format!("{address}/api/jobs");
    let status = |jobs: &Value| jobs[0]["status"].clone();
    until(&jobs, |jobs| jobs[0]["running"] == json!(true) && status(jobs)["step"].as_u64() >= Some(2));

    // Changes need the token, this machine's name, and the page's own origin.
    let (control, bearer) = (format!("{address}/api/jobs/0/control"), format!("Bearer {token}"));
    let pause = json!({"action": "pause"});
    let auth = ("authorization", bearer.as_str());
    for headers in [
        vec![],
        vec![("authorization", "Bearer guess")],
        vec![auth, ("origin", "http://evil.example")],
        vec![auth, ("host", "evil.example")],
        vec![auth, ("sec-fetch-site", "cross-site")],
    ] {
        assert_eq!(post(&control, &headers, &pause).0, 403, "{headers:?}");
    }
    assert_eq!(post(&control, &[auth], &json!({"action": "explode"})).0, 422);

    assert_eq!(post(&control, &[auth, ("origin", &address)], &pause).0, 200);
    let paused = until(&jobs, |jobs| status(jobs)["paused"] == json!(true));
    let step = status(&paused)["step"].clone();
    assert_eq!(post(&control, &[auth], &json!({"action": "checkpoint"})), (200, json!({"step": step})));
    assert_eq!(status(&get(&jobs))["step"], step, "it waits");
    // It answers while it waits.
    let listed = until(&format!("{address}/api/jobs/0/answers?sort=best"), |list| list["complete"] == json!(true));
    assert!(listed["matched"].as_u64().unwrap() >= 8, "{listed}");
    let scored =
        post(&format!("{address}/api/jobs/0/score"), &[auth], &json!({"step": 0, "index": 0, "completion": 1})).1;
    let tokens = scored["tokens"].as_array().unwrap();
    assert!(!tokens.is_empty() && tokens.iter().all(|t| t["policy"].as_f64() < Some(0.0)), "{scored}");
    let overrule = |ranks: Value, person: &str| {
        let body = json!({"step": 0, "index": 1, "person": person, "ranks": ranks});
        post(&format!("{address}/api/jobs/0/overrule"), &[auth], &body)
    };
    assert_eq!(overrule(json!([1, 2, 3, 4]), "ben").0, 200);
    for (ranks, person) in [(json!([1, 2]), "ben"), (json!([0, 1, 2, 3]), "ben"), (json!([1, 2, 3, 4]), " ")] {
        let (status, body) = overrule(ranks, person);
        assert!(status == 400 && body["error"].as_str().unwrap().contains("record 1 of step 0"), "{status} {body}");
    }

    assert_eq!(post(&control, &[auth], &json!({"action": "unpause"})).0, 200);
    until(&jobs, |jobs| status(jobs)["step"].as_u64() > step.as_u64() && status(jobs)["paused"] == json!(false));
    assert_eq!(post(&control, &[auth], &json!({"action": "stop"})).0, 200);
    assert!(server.ended(), "the job goes on");
    drop(server);

    // Stopped with a checkpoint of the last whole step; the viewer reads what is left, and does not keep it locked.
    let (_viewer, address, token) = viewing(&[folder.path()]);
    let found = until(&format!("{address}/api/jobs"), |jobs| jobs[0]["running"] == json!(false));
    let status = &found[0]["status"];
    assert_eq!(status["checkpoint"], status["step"]);
    let kept = get(&format!("{address}/api/jobs/0/answers/0/1"));
    assert_eq!(kept["overruled"]["judge"], json!("person:ben"), "{kept}");
    let (code, refused) = post(
        &format!("{address}/api/jobs/0/control"),
        &[("authorization", &format!("Bearer {token}"))],
        &json!({"action": "pause"}),
    );
    assert!(code == 400 && refused["error"].as_str().unwrap().contains("rehearsal resume"), "{code} {refused}");
    let deadline = std::time::Instant::now() + PATIENCE;
    while Store::open(&directory).is_err() {
        assert!(std::time::Instant::now() < deadline, "the viewer keeps the store locked");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}

#[test]
fn a_directory_without_a_job_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let output = rehearsal(&["view", folder.path().to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("has no job; name the directory of a job, or of jobs"), "{}", stderr(&output));
}
