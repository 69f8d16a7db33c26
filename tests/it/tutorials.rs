//! The tutorial of the command line: its files are written and its commands are run, in their order.

use std::fs;

use crate::support::{program, stderr, stdout};

const PAGE: &str = include_str!("../../docs/tutorials/preferences_to_model.md");

/// The words of a command; quotes keep a word together.
fn words(command: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    for c in command.chars() {
        match c {
            '"' => quoted = !quoted,
            ' ' if !quoted => words.push(String::new()),
            c => words.last_mut().unwrap().push(c),
        }
    }
    words
}

#[test]
fn from_preferences_to_a_deployed_model() {
    let folder = tempfile::tempdir().unwrap();
    let mut commands = 0;
    let mut blocks = PAGE.split("```").skip(1).step_by(2);
    while let Some((kind, body)) = blocks.next().map(|block| block.split_once('\n').unwrap()) {
        if let Some((_, file)) = kind.split_once(' ') {
            fs::write(folder.path().join(file), body).unwrap();
            continue;
        }
        assert_eq!(kind, "console");
        for command in body.lines() {
            let words = words(command.strip_prefix("$ rehearsal ").expect("a command"));
            let output = program().args(&words).current_dir(folder.path()).output().unwrap();
            assert!(output.status.success(), "{command}: {}{}", stdout(&output), stderr(&output));
            commands += 1;
        }
    }
    assert!(commands >= 9, "{commands} commands");
    assert!(folder.path().join("deployed/model.safetensors").exists());
}
