//! Completions by other processes: who generates them changes no bit, and nothing that happens to them does.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rehearsal::lm::random::Stream;
use rehearsal::{Config, make_certificates};

use crate::support::edit::replace_once;
use crate::support::jobs::{LORA, PPO, ROLLOUTS, job};
use crate::support::{PATIENCE, Remains, free_port, number, program, run};

/// Certificates, made once.
fn certificates(folder: &Path) -> PathBuf {
    let directory = folder.join("certificates");
    make_certificates(&directory, &["example.test".into()]).unwrap();
    directory
}

/// Sections of a job that nodes join at `port`.
pub fn with(more: &str, port: u16, certificates: &Path, rest: &str) -> String {
    let path = certificates.display();
    format!(
        "{more}[nodes]\nlisten = \"127.0.0.1:{port}\"\nauthority = \"{path}/authority.pem\"\n\
         certificate = \"{path}/coordinator.pem\"\nkey = \"{path}/coordinator.key\"\ncompletions_per_lease = 4\n{rest}\n"
    )
}

/// A node in a process of its own.
pub struct Node(Child);

impl Node {
    /// A node of a coordinator on this machine.
    pub fn start(port: u16, certificates: &Path, name: &str) -> Self {
        Self::by(program(), &format!("127.0.0.1:{port}"), certificates, name)
    }

    /// A node that a command starts, which runs this program.
    pub fn by(mut command: Command, join: &str, certificates: &Path, name: &str) -> Self {
        let file = |name: &str| certificates.join(name).display().to_string();
        let child = command
            .args(["node", "--join", join, "--name", name, "--threads", "1"])
            .args(["--authority", &file("authority.pem"), "--certificate", &file("node.pem")])
            .args(["--key", &file("node.key"), "--patience", "120"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self(child)
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: i32) {
        let pid = i32::try_from(self.0.id()).unwrap();
        // SAFETY: a signal to a child that was not waited for.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    pub fn kill(&mut self) {
        let _ = self.0.kill(); // it may have ended
        let _ = self.0.wait();
    }

    /// Ends it as a service manager does; what it printed.
    pub fn end(mut self) -> String {
        self.signal(libc::SIGTERM);
        let (mut said, mut errors) = (String::new(), String::new());
        self.0.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        self.0.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
        assert!(self.0.wait().unwrap().success(), "{errors}");
        said
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
    }
}

pub fn config(folder: &Path, algorithm: &str, steps: u64, more: &str) -> Config {
    Config::load(&job(folder, algorithm, steps, more).0).unwrap_or_else(|e| panic!("{e}"))
}

pub fn remains(algorithm: &str, steps: u64, more: &str) -> Remains {
    let folder = tempfile::tempdir().unwrap();
    run(config(folder.path(), algorithm, steps, more)).unwrap();
    Remains::of(&folder.path().join("job"))
}

/// What jobs of nodes are compared with, and their sections.
fn kinds() -> Vec<(&'static str, u64, String)> {
    let ahead = |steps: u64| replace_once(ROLLOUTS, "[rollout]\n", &format!("[rollout]\nahead = {steps}\n"));
    vec![
        ("online_dpo", 6, ROLLOUTS.into()),
        ("online_dpo", 6, ahead(1)),
        ("ppo", 5, format!("{}{PPO}{LORA}", ahead(2))),
    ]
}

#[test]
fn two_nodes_generate_what_the_coordinator_would() {
    for (algorithm, steps, more) in kinds() {
        let want = remains(algorithm, steps, &more);
        let folder = tempfile::tempdir().unwrap();
        let (port, certificates) = (free_port(), certificates(folder.path()));
        // The nodes are there first, and try again until the job is.
        let nodes = ["a", "b"].map(|name| Node::start(port, &certificates, name));
        run(config(folder.path(), algorithm, steps, &with(&more, port, &certificates, "local = false"))).unwrap();
        Remains::of(&folder.path().join("job")).assert_same(&want);
        for node in nodes {
            let said = node.end();
            let delivered = said.lines().find_map(|line| line.strip_suffix(" completions delivered"));
            assert!(delivered.unwrap_or("0").parse::<u32>().unwrap() > 0, "{said}");
        }
    }
}

#[test]
fn nodes_and_coordinators_that_die_change_nothing() {
    let deaths = number("REHEARSAL_NODE_KILLS", 12);
    let (mut nodes_killed, mut coordinators_killed, mut round) = (0, 0, 0u64);
    while nodes_killed + coordinators_killed < deaths {
        let (algorithm, steps, more) = kinds().swap_remove(round as usize % kinds().len());
        let steps = 2 * steps;
        let want = remains(algorithm, steps, &more);
        let folder = tempfile::tempdir().unwrap();
        let (port, certificates) = (free_port(), certificates(folder.path()));
        let random = Stream::new(number("REHEARSAL_SEED", 1), round);
        let more = with(&more, port, &certificates, "lease_seconds = 1");
        let (file, directory) = job(folder.path(), algorithm, steps, &more);
        let over = AtomicBool::new(false);
        let killed = std::thread::scope(|scope| {
            let killer = scope.spawn(|| {
                let mut nodes = ["a", "b"].map(|name| Node::start(port, &certificates, name));
                let mut killed = 0;
                for i in 0.. {
                    std::thread::sleep(Duration::from_millis(100 + (random.uniform(i) * 500.0) as u64));
                    if over.load(Ordering::Relaxed) {
                        return killed;
                    }
                    let (which, name) = if random.uniform(1000 + i) < 0.5 { (0, "a") } else { (1, "b") };
                    nodes[which].kill();
                    killed += 1;
                    nodes[which] = Node::start(port, &certificates, name);
                }
                killed
            });
            let began = Instant::now();
            let mut tries = 0;
            loop {
                assert!(began.elapsed() < PATIENCE, "the job does not end");
                let resumes = directory.join("job.toml").exists();
                let arguments =
                    if resumes { ["resume", directory.to_str().unwrap()] } else { ["run", file.to_str().unwrap()] };
                let mut coordinator =
                    program().args(arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
                if tries < 3 {
                    std::thread::sleep(Duration::from_millis(200 + (random.uniform(2000 + tries) * 800.0) as u64));
                    if coordinator.try_wait().unwrap().is_none() {
                        coordinator.kill().unwrap();
                        coordinators_killed += 1;
                    }
                    tries += 1;
                }
                let output = coordinator.wait_with_output().unwrap();
                if output.status.success() {
                    break;
                }
                let said = String::from_utf8_lossy(&output.stderr);
                assert_eq!(output.status.code(), None, "{said}");
            }
            over.store(true, Ordering::Relaxed);
            killer.join().unwrap()
        });
        nodes_killed += killed;
        Remains::of(&directory).assert_same(&want);
        round += 1;
    }
    println!("{nodes_killed} nodes and {coordinators_killed} coordinators killed in {round} jobs, no difference");
}

#[test]
fn what_a_node_cannot_do_is_said_in_words() {
    let folder = tempfile::tempdir().unwrap();
    let ours = certificates(folder.path());
    let other = tempfile::tempdir().unwrap();
    let theirs = certificates(other.path());
    let port = free_port();
    let join = format!("127.0.0.1:{port}");
    let node = |directory: &Path, patience: &str| {
        let file = |name: &str| directory.join(name).display().to_string();
        program()
            .args(["node", "--join", &join, "--patience", patience, "--authority", &file("authority.pem")])
            .args(["--certificate", &file("node.pem"), "--key", &file("node.key")])
            .output()
            .unwrap()
    };
    // Nobody is there.
    let output = node(&ours, "1");
    let said = String::from_utf8_lossy(&output.stderr).to_string();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("the coordinator at {join} was not there for 1 s")), "{said}");
    // A file that is no certificate, and certificates that are there already.
    let output = node(folder.path(), "1");
    let said = String::from_utf8_lossy(&output.stderr).to_string();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("node.pem") && said.contains("rehearsal certificates"), "{said}");
    let again = make_certificates(&ours, &[]).unwrap_err().to_string();
    assert!(again.contains("authority.pem is there already"), "{again}");
    // Missing keys of the job, all of them named.
    let text = format!("{ROLLOUTS}[nodes]\nlisten = \"{join}\"\n");
    let error = Config::load(&job(folder.path(), "online_dpo", 1, &text).0).unwrap_err().to_string();
    for key in ["nodes.authority", "nodes.certificate", "nodes.key"] {
        assert!(error.contains(key), "{error}");
    }
    // A node of another authority is not let in, and the job waits for one that is.
    let stranger = Node::start(port, &theirs, "stranger");
    let node = std::thread::spawn({
        let ours = ours.clone();
        move || {
            std::thread::sleep(Duration::from_secs(2));
            Node::start(port, &ours, "own")
        }
    });
    run(config(folder.path(), "online_dpo", 2, &with(ROLLOUTS, port, &ours, "local = false"))).unwrap();
    assert!(node.join().unwrap().end().contains("own has joined"));
    assert!(!stranger.end().contains("joined"));
}
