//! The ledger as data: out to files, in from them, and learned from as it is.

use rehearsal::Config;
use rehearsal::store::{Query, Store};
use serde_json::{Value, json};

use crate::support::{job_file, rehearsal, run, stderr};

fn lines(file: &std::path::Path) -> Vec<Value> {
    std::fs::read_to_string(file).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_ledger_goes_out_and_comes_in_and_is_learned_from() {
    let folder = tempfile::tempdir().unwrap();
    let (file, job) = job_file(folder.path(), 4, "");
    assert!(rehearsal(&["run", file.to_str().unwrap()]).status.success());
    let job = job.to_str().unwrap();
    let path = |name: &str| folder.path().join(name);
    for rows in ["pairs", "rankings", "verdicts"] {
        for ending in ["jsonl", "parquet"] {
            let out = path(&format!("{rows}.{ending}"));
            let output = rehearsal(&["export", job, "--rows", rows, "--ledger", out.to_str().unwrap()]);
            assert!(output.status.success(), "{}", stderr(&output));
        }
    }
    let pairs = lines(&path("pairs.jsonl"));
    assert!(!pairs.is_empty() && pairs.iter().all(|row| row["judge"] == "rules"), "{pairs:?}");
    let late = rehearsal(&["export", job, "--ledger", "-", "--from-step", "3", "--judge", "rules"]);
    let wanted = pairs.iter().filter(|row| row["step"] == 3).count();
    assert_eq!(String::from_utf8_lossy(&late.stdout).lines().count(), wanted);
    let none = rehearsal(&["export", job, "--ledger", "-", "--judge", "nobody"]);
    assert!(stderr(&none).contains("the ledger has no pairs of that kind"), "{}", stderr(&none));

    // Parquet holds what JSON Lines hold, and comes back as it went.
    let imported = path("imported");
    for name in ["rankings.parquet", "pairs.parquet"] {
        let output = rehearsal(&["import", imported.to_str().unwrap(), path(name).to_str().unwrap()]);
        assert!(output.status.success(), "{}", stderr(&output));
    }
    let rankings = lines(&path("rankings.jsonl"));
    let (store, _) = Store::open(&imported).unwrap();
    let back: Vec<_> = store.query(Query::default()).unwrap().map(Result::unwrap).collect();
    assert_eq!(back.len(), rankings.len() + pairs.len());
    for (verdict, row) in back.iter().zip(&rankings) {
        assert_eq!(
            (json!(verdict.completions), json!(verdict.ranks())),
            (row["completions"].clone(), row["ranks"].clone())
        );
        assert_eq!((verdict.judge.as_str(), json!(verdict.scores)), ("rules", row["scores"].clone()));
    }
    drop(store);

    // A job learns the same from the ledger, from its export and from its import.
    for algorithm in ["dpo", "reward_model"] {
        let loss = |data: &str| {
            let directory = tempfile::tempdir().unwrap();
            let text = format!(
                "[job]\ndirectory = \"{}\"\nalgorithm = \"{algorithm}\"\nsteps = 2\n[data]\ntrain = [\"{data}\"]\n\
                 batch_size = 4\n[evaluation]\nevery_steps = 0\n",
                directory.path().join("job").display()
            );
            run(Config::from_toml(&text, folder.path()).unwrap_or_else(|e| panic!("{e}"))).unwrap();
            lines(&directory.path().join("job/history.jsonl")).iter().map(|r| r["loss"].clone()).collect::<Vec<_>>()
        };
        let file = if algorithm == "dpo" { "pairs" } else { "rankings" };
        let from_ledger = loss(job);
        assert_eq!(from_ledger, loss(&format!("{file}.jsonl")), "{algorithm}");
        assert_eq!(from_ledger, loss(&format!("{file}.parquet")), "{algorithm}");
    }
}

#[test]
fn what_cannot_be_imported_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let (file, into) = (folder.path().join("rows.jsonl"), folder.path().join("ledger"));
    let import = || rehearsal(&["import", into.to_str().unwrap(), file.to_str().unwrap()]);
    std::fs::write(&file, "{\"prompt\": \"Who?\", \"chosen\": \"a\", \"rejected\": \"a\"}\nnonsense\n").unwrap();
    let output = import();
    assert!(!output.status.success() && stderr(&output).contains("no row can be used"), "{}", stderr(&output));
    let good = "{\"prompt\": \"Who?\", \"chosen\": \"a\", \"rejected\": \"b\", \"margin\": 2}\n";
    std::fs::write(&file, format!("{good}{{\"prompt\": \"Who?\"}}\n")).unwrap();
    let output = import();
    assert!(output.status.success() && stderr(&output).contains("line 2 first"), "{}", stderr(&output));
    let (store, _) = Store::open(&into).unwrap();
    let all: Vec<_> = store.preferences().unwrap().map(Result::unwrap).collect();
    assert_eq!((all.len(), all[0].margin(), all[0].judge.as_str()), (1, 2.0, "imported"));
}
