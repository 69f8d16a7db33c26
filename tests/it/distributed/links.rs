//! Nodes in network namespaces: machines of their own as far as links go. Links that are cut or slow, nodes that stop, and coordinators
//! that die change no bit.
//!
//! `REHEARSAL_FAULTS=long` makes the faults as long as `docs/machines.md` has them, which takes minutes.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::nodes::{Node, remains, with};
use crate::support::jobs::{ROLLOUTS, job};
use crate::support::parts::{Part, skip};
use crate::support::{PATIENCE, Remains, free_port, program};

fn ip(arguments: &[&str]) -> bool {
    Command::new("ip").args(arguments).output().is_ok_and(|output| output.status.success())
}

/// A machine with a link to this one.
struct Machine {
    name: String,
    /// The link's end here.
    link: String,
    /// Address of the link's end here.
    here: String,
}

impl Machine {
    fn new(index: u8) -> Option<Self> {
        let id = std::process::id() % 10_000;
        let (name, link, there) =
            (format!("rehearsal-{id}-{index}"), format!("rh{id}x{index}"), format!("rt{id}x{index}"));
        if !ip(&["netns", "add", &name]) {
            return None;
        }
        let net = format!("10.{}.{index}", 64 + id % 64);
        let (here, beyond) = (format!("{net}.1"), format!("{net}.2/24"));
        let machine = Self { name, link, here };
        let Self { name, link, here } = &machine;
        let made = ip(&["link", "add", link, "type", "veth", "peer", "name", &there, "netns", name])
            && ip(&["addr", "add", &format!("{here}/24"), "dev", link])
            && ip(&["link", "set", link, "up"])
            && machine.runs(&["addr", "add", &beyond, "dev", &there])
            && machine.runs(&["link", "set", &there, "up"]);
        made.then_some(machine)
    }

    /// A program on the machine. `ip netns exec` would make a namespace of mounts too, which keeps those of other tests busy.
    fn command(&self, program: &std::ffi::OsStr) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/var/run/netns/{}", self.name)).arg(program);
        command
    }

    fn runs(&self, arguments: &[&str]) -> bool {
        self.command("ip".as_ref()).args(arguments).output().is_ok_and(|output| output.status.success())
    }

    fn cut(&self) {
        assert!(ip(&["link", "set", &self.link, "down"]));
    }

    fn mend(&self) {
        assert!(ip(&["link", "set", &self.link, "up"]));
    }

    /// Limits what goes to the machine.
    fn slow(&self, rate: &str) {
        let arguments =
            ["qdisc", "add", "dev", &self.link, "root", "tbf", "rate", rate, "burst", "16kb", "latency", "400ms"];
        assert!(Command::new("tc").args(arguments).status().unwrap().success());
    }

    fn node(&self, port: u16, certificates: &Path, name: &str) -> Node {
        Node::by(self.command(program().get_program()), &format!("{}:{port}", self.here), certificates, name)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        ip(&["link", "del", &self.link]);
        ip(&["netns", "del", &self.name]);
    }
}

/// A job with two nodes, each on a machine of its own.
struct Scene {
    machines: [Machine; 2],
    nodes: Vec<Node>,
    file: std::path::PathBuf,
    directory: std::path::PathBuf,
    coordinator: Child,
}

impl Scene {
    fn coordinator(arguments: [&str; 2]) -> Child {
        program().args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Ends the coordinator without warning.
    fn kill(&mut self) {
        self.coordinator.kill().unwrap();
        self.coordinator.wait().unwrap();
    }

    /// Waits until the job has done two steps, so that a node is there.
    fn begins(&self) {
        let start = Instant::now();
        let steps =
            || std::fs::read_to_string(self.directory.join("history.jsonl")).map_or(0, |text| text.lines().count());
        while steps() < 2 {
            assert!(start.elapsed() < PATIENCE, "the job does not begin");
            pause(0.05);
        }
    }

    fn resume(&mut self) {
        let resumes = self.directory.join("job.toml").exists();
        self.coordinator = match resumes {
            true => Self::coordinator(["resume", self.directory.to_str().unwrap()]),
            false => Self::coordinator(["run", self.file.to_str().unwrap()]),
        };
    }
}

fn pause(seconds: f64) {
    std::thread::sleep(Duration::from_secs_f64(seconds));
}

/// Runs a job while something happens to it; its seconds, and what it said of its nodes.
fn play(index: u8, steps: u64, event: impl FnOnce(&mut Scene)) -> Option<(f64, Vec<String>)> {
    let machines = [Machine::new(index)?, Machine::new(index + 1)?];
    let folder = tempfile::tempdir().unwrap();
    let (port, certificates) = (free_port(), folder.path().join("certificates"));
    rehearsal::make_certificates(&certificates, &machines.each_ref().map(|m| m.here.clone())).unwrap();
    let more = with(ROLLOUTS, port, &certificates, "local = false\nlease_seconds = 2");
    let more = more.replace("127.0.0.1", "0.0.0.0");
    let (file, directory) = job(folder.path(), "online_dpo", steps, &more);
    let nodes = (machines.iter().zip(["a", "b"])).map(|(m, name)| m.node(port, &certificates, name)).collect();
    let start = Instant::now();
    let coordinator = Scene::coordinator(["run", file.to_str().unwrap()]);
    let mut scene = Scene { machines, nodes, file, directory, coordinator };
    event(&mut scene);
    let output = scene.coordinator.wait_with_output().unwrap();
    let seconds = start.elapsed().as_secs_f64();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Remains::of(&scene.directory).assert_same(&remains("online_dpo", steps, ROLLOUTS));
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    Some((seconds, said.lines().filter(|line| line.contains("node ")).map(String::from).collect()))
}

#[test]
fn links_that_fail_and_machines_that_stop_change_nothing() {
    if Machine::new(200).is_none() {
        skip(Part::Netns, "no rights to make network namespaces (`ip netns add`)");
        return;
    }
    let long = std::env::var("REHEARSAL_FAULTS").is_ok_and(|value| value == "long");
    let or = |short: f64, seconds: f64| if long { seconds } else { short };
    let told = |what: &str, played: Option<(f64, Vec<String>)>| {
        let (seconds, said) = played.expect("two machines");
        println!("| {what} | {seconds:.1} s | {} |", said.join("; "));
        said
    };
    let lost =
        |said: &[String], node: &str| said.iter().any(|line| line.contains(&format!("node {node} was not heard of")));
    told("nothing happens", play(0, 12, |_| {}));
    let cut = |scene: &mut Scene, which: &[usize], seconds: f64| {
        scene.begins();
        which.iter().for_each(|i| scene.machines[*i].cut());
        pause(seconds);
        which.iter().for_each(|i| scene.machines[*i].mend());
    };
    let seconds = or(3.0, 60.0);
    told(&format!("the link of one is cut for {seconds} s"), play(2, 12, |scene| cut(scene, &[0], seconds)));
    let said = told("the links of both are cut for 3 s", play(4, 40, |scene| cut(scene, &[0, 1], 3.0)));
    assert!(lost(&said, "a") || lost(&said, "b"), "{said:?}");
    let seconds = or(4.0, 20.0);
    told(
        &format!("one is stopped (SIGSTOP) for {seconds} s"),
        play(6, 40, |scene| {
            scene.begins();
            scene.nodes[0].signal(libc::SIGSTOP);
            pause(seconds);
            scene.nodes[0].signal(libc::SIGCONT);
        }),
    );
    told(
        "the coordinator is killed and resumes after 2 s",
        play(8, 40, |scene| {
            scene.begins();
            scene.kill();
            pause(2.0);
            scene.resume();
        }),
    );
    let (rate, steps) = if long { ("1mbit", 6) } else { ("20mbit", 3) };
    told(&format!("both links have {rate}"), play(10, steps, |scene| scene.machines.iter().for_each(|m| m.slow(rate))));
}
