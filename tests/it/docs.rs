//! Pages that are made from the program are true. `REHEARSAL_BLESS=1` writes them.

use std::path::Path;

use rehearsal::{Algorithms, Config, metrics};

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
    check("docs/config.md", Config::reference());
    let schema = serde_json::to_string_pretty(&Config::json_schema()).unwrap();
    check("docs/config.schema.json", format!("{schema}\n"));
}

#[test]
fn docs_metrics_is_the_table() {
    check("docs/metrics.md", metrics::markdown(&Algorithms::default().metrics()));
}

#[test]
fn docs_methods_names_every_golden_file() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = std::fs::read_to_string(root.join("docs/methods.md")).unwrap();
    let mut seen = 0;
    for entry in std::fs::read_dir(root.join("tests/golden")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if !name.starts_with("SCHEMA") && name != "tiny-llama-ref" && !name.contains("-reference") {
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

fn read(page: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(page)).unwrap()
}

/// The cells of the first row of a Markdown text that starts with a label.
fn row<'a>(text: &'a str, label: &str) -> Vec<&'a str> {
    let line = text.lines().find(|line| line.starts_with(&format!("| {label} |")));
    let line = line.unwrap_or_else(|| panic!("no row `{label}` in\n{text}"));
    line.trim_matches('|').split('|').map(str::trim).collect()
}

/// The numbers of a cell such as `14.8, 14.5 s`.
fn numbers(cell: &str) -> Vec<f64> {
    cell.split([',', ' ']).filter_map(|word| word.parse().ok()).collect()
}

#[test]
fn the_readme_states_the_ratios_of_the_performance_page() {
    let (readme, page) = (read("README.md"), read("docs/performance.md"));
    let online_dpo = page.split("## Against TRL").nth(1).unwrap().split("\n## ").next().unwrap();
    let long_prompts = online_dpo.split("long prompts").nth(1).unwrap();
    let stated = readme.split("| time of a step | peak memory |").nth(1).unwrap();
    for (label, source, time, memory) in [
        ("f32", online_dpo, "f32, step", "f32, peak memory"),
        ("bf16", online_dpo, "bf16, step, two rounds", "bf16, peak memory"),
        ("f32, prompts of about 350 tokens", long_prompts, "step", "peak memory"),
    ] {
        for (column, measured) in [(1, time), (2, memory)] {
            let measured = row(source, measured);
            let (theirs, ours, ratios) = (numbers(measured[1]), numbers(measured[2]), numbers(measured[3]));
            assert!(!ratios.is_empty() && theirs.len() == ratios.len() && ours.len() == ratios.len(), "{measured:?}");
            for ((theirs, ours), ratio) in theirs.iter().zip(&ours).zip(&ratios) {
                assert!((ours / theirs - ratio).abs() < 0.0051, "{ours} / {theirs} is not {ratio}");
            }
            let worst = ratios.iter().copied().fold(0.0, f64::max);
            assert_eq!(
                numbers(row(stated, label)[column]),
                [worst],
                "README, `{label}`: docs/performance.md has {ratios:?}"
            );
        }
    }
}

#[test]
fn readme_and_help_agree_on_the_quickstart() {
    let help = crate::support::stdout(&crate::support::rehearsal(&["--help"]));
    let line = help.lines().find(|line| line.contains("run examples/quickstart.toml")).unwrap();
    assert!(line.contains("about fifteen seconds") && read("README.md").contains("in about fifteen seconds"), "{line}");
}

#[test]
fn what_starts_nodes_names_options_that_exist() {
    let help = crate::support::rehearsal(&["node", "--help"]);
    let help = String::from_utf8(help.stdout).unwrap();
    for file in ["systemd/rehearsal-node.service", "slurm/nodes.sbatch", "kubernetes/rehearsal.yaml"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy").join(file);
        let text = std::fs::read_to_string(path).unwrap();
        for option in ["--join", "--authority", "--certificate", "--key"] {
            let names = |text: &str| text.split(|c: char| c.is_whitespace() || c == '=').any(|word| word == option);
            assert!(names(&text) && names(&help), "{file}: {option}");
        }
    }
}
