//! `command:PROGRAM`: a program that reads one JSON object a line, `{"image": PATH, "prompt": TEXT,
//! "metadata": OBJECT}`, and answers each with one line that holds a number. It is started once and
//! stays, so that it loads its model once.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use image::RgbImage;

use super::prompt::Prompt;
use super::score::Reward;
use crate::stop;

/// How often a wait for an answer looks whether the user wants to stop.
const LOOK: Duration = Duration::from_millis(100);
/// How long a program may take to end after its end of input.
const GRACE: Duration = Duration::from_secs(5);

/// Answers that wait to be read at most: a program that writes without end is held back.
const ANSWERS: usize = 1024;

/// A running reward program.
pub struct Command {
    program: String,
    child: Child,
    stdin: Option<ChildStdin>,
    /// Its answers, read by a thread: a wait for one can be broken off.
    answers: Mutex<Receiver<String>>,
    folder: tempfile::TempDir,
    /// How long it may take for an answer.
    patience: Duration,
}

impl Command {
    /// Starts the program through the system's shell. It has ten times as long for an answer as a
    /// server: it may load a model first, or take all pictures at once.
    pub fn start(program: &str, timeout: Duration) -> Result<Self> {
        let mut command = shell(program);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command
            .spawn()
            .with_context(|| format!("--reward command:{program}: cannot be started"))?;
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let (send, answers) = sync_channel(ANSWERS);
        // Ends with the program's output, or when nobody listens any more.
        std::thread::spawn(move || {
            stdout.lines().map_while(Result::ok).try_for_each(|line| send.send(line))
        });
        let folder = tempfile::tempdir().context("a folder for the reward program's images")?;
        let (answers, patience) = (Mutex::new(answers), timeout.saturating_mul(10));
        Ok(Self { program: program.into(), child, stdin, answers, folder, patience })
    }
}

/// # Errors
/// When there is no program, with `name` in front.
pub fn check(name: &str, program: &str) -> Result<()> {
    ensure!(!program.trim().is_empty(), "{name}: has no program; write command:PROGRAM ARGUMENTS");
    Ok(())
}

/// The system's shell with the program as its only command, in a group of its own: Ctrl-C is for
/// the run, which needs the program to its end.
#[cfg(unix)]
fn shell(program: &str) -> std::process::Command {
    let mut command = std::process::Command::new("sh");
    command.args(["-c", program]);
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    command
}

#[cfg(windows)]
fn shell(program: &str) -> std::process::Command {
    use std::os::windows::process::CommandExt;
    const CREATE_NEW_PROCESS_GROUP: u32 = 0x200;
    let mut command = std::process::Command::new("cmd");
    // With /S cmd drops the outer quotes and takes what is between them as it stands; quoting by
    // the C runtime's rules, which `arg` does, would put backslashes into it.
    command.raw_arg(format!("/S /C \"{program}\"")).creation_flags(CREATE_NEW_PROCESS_GROUP);
    command
}

/// Waits for the program to end by itself, for a while, then ends it, and in any case what it has
/// started. Its status, if it ended by itself.
fn end(child: &mut Child) -> Option<ExitStatus> {
    let start = Instant::now();
    while start.elapsed() < GRACE && !has_ended(child) {
        std::thread::sleep(Duration::from_millis(10));
    }
    let by_itself = has_ended(child);
    kill(child);
    child.wait().ok().filter(|_| by_itself)
}

/// Whether the program has ended. It is not waited for: its number stays its own, and that of the
/// group that what it has started is in.
#[cfg(unix)]
fn has_ended(child: &mut Child) -> bool {
    let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: the call fills plain memory; of a child that runs it leaves the zeros.
    unsafe {
        let mut about: libc::siginfo_t = std::mem::zeroed();
        let found = libc::waitid(libc::P_PID, child.id(), &mut about, options);
        found != 0 || about.si_pid() != 0
    }
}

#[cfg(windows)]
fn has_ended(child: &mut Child) -> bool {
    !matches!(child.try_wait(), Ok(None))
}

/// Kills the program with everything that its shell started.
fn kill(child: &mut Child) {
    // SAFETY: a signal to the group that was made for the child, which has not been waited for.
    #[cfg(unix)]
    unsafe {
        libc::kill(-(child.id() as i32), libc::SIGKILL);
    }
    // Ending cmd alone would leave what it started.
    #[cfg(windows)]
    {
        let id = child.id().to_string();
        let mut tree = std::process::Command::new("taskkill");
        let tree = tree.args(["/T", "/F", "/PID", &id]).stdout(Stdio::null()).stderr(Stdio::null());
        let _ = tree.status();
    }
    let _ = child.kill();
}

impl Reward for Command {
    fn score(&mut self, images: &[RgbImage], prompts: &[&Prompt]) -> Result<Vec<f64>> {
        let mut lines = String::new();
        for (i, (image, prompt)) in images.iter().zip(prompts).enumerate() {
            let path = self.folder.path().join(format!("{i:05}.png"));
            image.save(&path).with_context(|| format!("{}: cannot be written", path.display()))?;
            let Prompt { text, metadata } = prompt;
            let item = serde_json::json!({ "image": path, "prompt": text, "metadata": metadata });
            lines += &format!("{item}\n");
        }
        if let Ok(line) = self.answers.get_mut().expect("no thread panics with it").try_recv() {
            bail!(
                "--reward command:{}: answered {:?} without being asked; it must write one line \
                 for each line it reads",
                self.program,
                line.trim()
            );
        }
        let stdin = self.stdin.as_mut().expect("a program that died is not asked again");
        // Written from a thread: a program that answers while it reads must not find both pipes
        // full.
        let answers = std::thread::scope(|scope| {
            let writer =
                scope.spawn(|| stdin.write_all(lines.as_bytes()).and_then(|()| stdin.flush()));
            let (mut answers, mut status, mut asked) = (Vec::new(), None, Instant::now());
            while answers.len() < images.len() {
                match self.answers.get_mut().expect("no thread panics with it").recv_timeout(LOOK) {
                    Ok(line) => {
                        answers.push(line);
                        asked = Instant::now();
                    }
                    Err(RecvTimeoutError::Disconnected) => {
                        // The writer may wait for a program that reads no more, here and below.
                        status = Some(end(&mut self.child));
                        break;
                    }
                    Err(RecvTimeoutError::Timeout) => {
                        // What it has started may hold its output open.
                        if has_ended(&mut self.child) {
                            status = Some(end(&mut self.child));
                            break;
                        }
                        if asked.elapsed() > self.patience {
                            kill(&mut self.child);
                            bail!(
                                "--reward command:{}: no answer within {} seconds, ten times \
                                 --reward-timeout; look what the program does, or give it \
                                 more time",
                                self.program,
                                self.patience.as_secs_f64()
                            );
                        }
                        if let Err(stopped) = stop::check() {
                            kill(&mut self.child);
                            return Err(stopped);
                        }
                    }
                }
            }
            let _ = writer.join().expect("the writer does not panic");
            Ok(match status {
                None => Ok(answers),
                Some(status) => {
                    Err(status.map_or("it closed its output".to_string(), |s| s.to_string()))
                }
            })
        })?;
        let answers = answers.map_err(|status| {
            anyhow!(
                "--reward command:{}: the program ended without an answer ({status}); run it by \
                 hand to see why",
                self.program
            )
        })?;
        let number = |answer: &String| {
            let value = answer.trim().parse::<f64>().ok().filter(|v| v.is_finite());
            value.ok_or_else(|| {
                anyhow!(
                    "--reward command:{}: answered {:?}, which is not a number",
                    self.program,
                    answer.trim()
                )
            })
        };
        answers.iter().map(number).collect()
    }
}

impl Drop for Command {
    fn drop(&mut self) {
        // Its end of input tells it to end.
        self.stdin = None;
        end(&mut self.child);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The shell waits for what it has started, deaf to the end of its input. Both hold the
    /// program's output open as long as they live.
    #[test]
    fn a_program_that_does_not_end_is_ended_with_what_it_started() {
        let endless =
            if cfg!(windows) { "ping -n 600 127.0.0.1" } else { "sleep 600 & echo started; wait" };
        let mut command = Command::start(endless, Duration::from_secs(60)).unwrap();
        let answers = std::mem::replace(&mut command.answers, Mutex::new(sync_channel(1).1));
        let answers = answers.into_inner().unwrap();
        answers.recv_timeout(Duration::from_secs(60)).unwrap();
        drop(command);
        let start = Instant::now();
        while answers.recv_timeout(Duration::from_secs(10)) != Err(RecvTimeoutError::Disconnected) {
            assert!(start.elapsed() < Duration::from_secs(10), "what the shell started lives on");
        }
    }
}
