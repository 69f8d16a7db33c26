//! Power cuts under the real program on a disk that loses what was not synced, sled's log included.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use fuser::BackgroundSession;

use super::cases::{self, Case, Prepared};
use super::disk::Disk;
use super::ways::Started;
use super::{Random, remains, seed, whole};
use crate::support::parts::{Part, skip};
use crate::support::{PATIENCE, number, program};

/// The program, in a system that was started anew: with a number of its own for the boot.
fn after_boot(arguments: [&str; 2], boot: &Path) -> Command {
    let script = r#"mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@""#;
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script]).arg(boot).arg(program().get_program()).args(arguments);
    command
}

/// Cuts the power of a job again and again; how often.
fn campaign(case: &Case, cuts: u32, index: u64) -> Option<u32> {
    let (want, time, _) = whole(case);
    let mut random = Random::new(seed(), 1000 + index);
    let mut done = 0;
    while done < cuts {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("disk");
        std::fs::create_dir(&place).unwrap();
        let mut disk = Disk::new();
        let mut boots = 0;
        let mut session = match disk.mount(&place) {
            Ok(session) => session,
            Err(e) => {
                skip(Part::Fuse, format_args!("a FUSE file system cannot be mounted: {e}"));
                return None;
            }
        };
        let job = case.prepare(&place);
        for file in std::fs::read_dir(&place).unwrap() {
            std::fs::File::open(file.unwrap().path()).unwrap().sync_all().unwrap();
        }
        std::fs::File::open(&place).unwrap().sync_all().unwrap();
        loop {
            boots += 1;
            let boot = folder.path().join("boot");
            std::fs::write(&boot, format!("00000000-0000-0000-0000-{boots:012}\n")).unwrap();
            let resumes = job.directory.join("job.toml").exists() && holds_a_job(&job);
            let arguments = match resumes {
                true => ["resume", job.directory.to_str().unwrap()],
                false => ["run", job.file.to_str().unwrap()],
            };
            let mut process = Started::new(after_boot(arguments, &boot));
            let ended = match done < cuts {
                true => process.ends_within(time.mul_f64(1.5 * random.share())),
                false => Some(process.wait()),
            };
            if let Some((status, stderr)) = ended {
                let name = case.name;
                assert!(status.success(), "{name}, seed {}, boot {boots}: {arguments:?}, {status}: {stderr}", seed());
                break;
            }
            disk.cut();
            process.signal(libc::SIGKILL);
            process.wait();
            done += 1;
            unmount(session, &place);
            disk = disk.survived(&mut random);
            session = disk.mount(&place).unwrap();
        }
        for (got, want) in remains(&job).iter().zip(&want) {
            got.assert_same(want);
        }
        unmount(session, &place);
    }
    Some(done)
}

/// Unmounts a disk and waits for the end of its session. It is busy for a moment: a store that was dropped closes its files in
/// threads of its own, and a process that another test starts has them until it runs its program.
fn unmount(session: BackgroundSession, place: &Path) {
    let path = CString::new(place.as_os_str().as_bytes()).unwrap();
    let deadline = Instant::now() + PATIENCE;
    // SAFETY: the path is a C string that outlives the call.
    while unsafe { libc::umount2(path.as_ptr(), 0) } != 0 {
        let error = std::io::Error::last_os_error();
        assert!(error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline, "{}: {error}", place.display());
        std::thread::sleep(Duration::from_millis(10));
    }
    session.join().unwrap();
}

/// Whether there is anything to resume, as the program itself sees it.
fn holds_a_job(job: &Prepared) -> bool {
    !job.stages.is_empty()
        || program().args(["status", job.directory.to_str().unwrap()]).output().unwrap().status.success()
}

#[test]
fn power_cuts_change_nothing() {
    let cases = cases::all();
    let wanted = ["SFT", "online DPO", "PPO, LoRA", "chain of SFT, reward model, PPO"];
    let cases: Vec<&Case> = cases.iter().filter(|case| wanted.contains(&case.name)).collect();
    let cuts = number("REHEARSAL_CUTS", cases.len() as u64) as usize;
    for (i, case) in cases.iter().enumerate() {
        let share = cuts / cases.len() + usize::from(i < cuts % cases.len());
        let Some(done) = campaign(case, share as u32, i as u64) else { return };
        println!("| {} | {done} power cuts |", case.name);
    }
}
