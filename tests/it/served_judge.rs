//! A judge behind a real server that speaks the OpenAI-compatible API over a real model: `transformers serve`.

use std::path::Path;
use std::process::{Child, Command};

use rehearsal::Config;
use rehearsal::store::Store;

use crate::support::parts::Part;
use crate::support::watch::{Phase, Watched};
use crate::support::{free_port, job_file, python_with, rehearsal, resume, rewarded_by, stderr, toml};

struct Served(Child);

impl Served {
    fn start(python: &str, port: u16, folder: &Path) -> Self {
        let log = std::fs::File::options().create(true).append(true).open(folder.join("serve.log")).unwrap();
        let program =
            "import sys; sys.argv[0] = 'transformers'; from transformers.cli.transformers import main; main()";
        let child = Command::new(python)
            .args(["-c", program, "serve", "--host", "127.0.0.1", "--port", &port.to_string()])
            .env("HF_HUB_OFFLINE", "1")
            .current_dir(folder)
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        Self(child)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_served_model_judges_dies_returns_and_is_paid_once() {
    let Some(python) = python_with(Part::Serve, "transformers, torch, fastapi, uvicorn") else { return };
    let folder = tempfile::tempdir().unwrap();
    // A model for the server: the embedded one, as `transformers` reads it.
    let (file, directory) = job_file(folder.path(), 1, "");
    assert!(rehearsal(&["run", file.to_str().unwrap()]).status.success());
    let model = directory.join("model");
    let port = free_port();
    let judge = format!(
        "[judge]\nurl = \"http://127.0.0.1:{port}/v1/chat/completions\"\napi_model = \"{}\"\ntokens_max = 8\n\
         unreachable = \"wait\"\nprice_input = 1.0\nprice_output = 2.0\n[evaluation]\nevery_steps = 0\n",
        model.display()
    );
    let judged = folder.path().join("judged");
    let text = rewarded_by(&toml(&judged, 3, ""), &judge);
    let file = folder.path().join("judged.toml");
    std::fs::write(&file, &text).unwrap();

    // The job begins before its server is there, and the server dies on the way.
    let mut job = Watched::start(&["run", file.to_str().unwrap()]);
    let server = Served::start(&python, port, folder.path());
    job.until(Phase::Stepped);
    drop(server);
    // The job goes on, to questions that nobody answers, while the server starts again.
    let server = std::thread::scope(|scope| {
        let end = scope.spawn(|| job.end());
        let server = Served::start(&python, port, folder.path());
        let status = end.join().unwrap();
        assert!(status.success(), "{}", std::fs::read_to_string(folder.path().join("serve.log")).unwrap());
        server
    });

    let (store, _) = Store::open(&judged).unwrap();
    let verdicts: Vec<_> = store.preferences().unwrap().map(Result::unwrap).collect();
    assert_eq!(verdicts.len(), 12);
    let exchanges: Vec<_> = verdicts.iter().flat_map(|v| &v.exchanges).collect();
    assert_eq!(exchanges.len(), 24, "both orders of every pair");
    let mut paid = rehearsal::store::Usage::default();
    for exchange in &exchanges {
        assert!(exchange.template.starts_with("helpful#") && exchange.judge.contains(&format!("127.0.0.1:{port}")));
        paid += exchange.usage;
    }
    // The server's own count of tokens. A reply that cannot be read is asked for once more, and nothing else is.
    let spent = store.spent().unwrap();
    assert!(spent.input_tokens > 0 && spent.output_tokens > 0 && spent.calls <= 48, "{spent:?}");
    assert!(paid.input_tokens > 0 && paid.output_tokens > 0, "{paid:?}");
    let money = (spent.input_tokens as f64 + 2.0 * spent.output_tokens as f64) / 1e6;
    assert!((spent.money - money).abs() < 1e-9, "{spent:?}");
    drop(store);
    drop(server);
    // All of it is known: resumed without a server, the job is done at once.
    let config = Config::from_toml(&text, Path::new(".")).unwrap();
    let outcome = resume(config).unwrap_or_else(|e| panic!("{e} {}", stderr(&rehearsal(&["status", "judged"]))));
    assert_eq!(outcome.step, 3);
}
