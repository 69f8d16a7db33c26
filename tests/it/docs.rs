//! Pages that are made from the program are true. `REHEARSAL_BLESS=1` writes them.

use std::path::Path;

use rehearsal::{Config, config, metrics};

fn check(page: &str, want: String) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(page);
    if std::env::var_os("REHEARSAL_BLESS").is_some() {
        std::fs::write(&path, &want).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(found == want, "{page} is out of date; REHEARSAL_BLESS=1 cargo test --test it docs");
}

#[test]
fn docs_config_is_the_schema() {
    check("docs/config.md", config::markdown());
}

#[test]
fn docs_metrics_is_the_table() {
    check("docs/metrics.md", metrics::markdown());
}

#[test]
fn docs_methods_names_every_golden_file() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = std::fs::read_to_string(root.join("docs/methods.md")).unwrap();
    let mut seen = 0;
    for entry in std::fs::read_dir(root.join("tests/golden")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name != "SCHEMA.md" && name != "tiny-llama-ref" && !name.contains("-reference") {
            seen += 1;
            assert!(page.contains(&format!("`{name}`")), "docs/methods.md does not name {name}");
        }
    }
    assert!(seen > 90, "{seen}");
}

#[test]
fn every_example_configuration_is_valid_but_for_files_to_fetch() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let mut seen = 0;
    for entry in std::fs::read_dir(examples).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "toml") {
            seen += 1;
            let source = std::fs::read_to_string(&path).unwrap();
            if let Err(e) = Config::stages(&source, path.parent().unwrap()) {
                let other: Vec<_> = e.problems.iter().filter(|p| !p.message.contains("which does not exist")).collect();
                assert!(other.is_empty(), "{}: {other:?}", path.display());
            }
        }
    }
    assert!(seen >= 8);
}
