//! A power cut after each step of what a run does to the disk.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use pcpo_wgpu::io::disk::{Step, record, recorded};
use pcpo_wgpu::{Job, Options, Silent, train};

use super::{cases, outcome, tiny};

fn options() -> Options {
    Options { ema: Some(0.9), ..tiny() }
}

/// A file or a folder, by its number.
#[derive(Clone, Debug)]
enum Node {
    /// The content, and what of it is on the disk.
    File { now: Vec<u8>, synced: Option<Vec<u8>> },
    /// The entries, and those that are on the disk.
    Dir { now: BTreeMap<String, usize>, synced: BTreeMap<String, usize> },
}

/// What a cut leaves of that which nobody has brought to the disk.
#[derive(Clone, Copy, Debug)]
enum Unsynced {
    /// All of it: the disk was quick.
    Stays,
    /// None of it.
    Goes,
    /// Names are there, contents are not.
    NamesStay,
}

/// A filesystem as a power cut sees it.
struct Disk {
    nodes: Vec<Node>,
    root: PathBuf,
}

impl Disk {
    fn new(root: &Path) -> Self {
        let empty = Node::Dir { now: BTreeMap::new(), synced: BTreeMap::new() };
        Self { nodes: vec![empty], root: root.to_path_buf() }
    }

    /// The names from the root to a path, none for what lies elsewhere.
    fn names(&self, path: &Path) -> Option<Vec<String>> {
        let below = path.strip_prefix(&self.root).ok()?;
        let name = |part: Component| part.as_os_str().to_str().unwrap().to_string();
        Some(below.components().map(name).collect())
    }

    fn find(&self, names: &[String]) -> usize {
        names.iter().fold(0, |at, name| match &self.nodes[at] {
            Node::Dir { now, .. } => now[name],
            Node::File { .. } => panic!("{names:?}: a file is no folder"),
        })
    }

    fn entries(&mut self, at: usize) -> &mut BTreeMap<String, usize> {
        match &mut self.nodes[at] {
            Node::Dir { now, .. } => now,
            Node::File { .. } => panic!("a file has no entries"),
        }
    }

    fn put(&mut self, path: &Path, node: Node) {
        let Some(names) = self.names(path) else { return };
        let Some((name, above)) = names.split_last() else { return };
        let at = self.find(above);
        self.nodes.push(node);
        let new = self.nodes.len() - 1;
        self.entries(at).insert(name.clone(), new);
    }

    fn take(&mut self, path: &Path) -> Option<usize> {
        let names = self.names(path)?;
        let (name, above) = names.split_last()?;
        let at = self.find(above);
        self.entries(at).remove(name)
    }

    fn apply(&mut self, step: &Step) {
        match step {
            Step::MakeDir(path) => {
                self.put(path, Node::Dir { now: BTreeMap::new(), synced: BTreeMap::new() });
            }
            Step::Write(path, bytes) => {
                self.put(path, Node::File { now: bytes.clone(), synced: None });
            }
            Step::SyncFile(path) => {
                let Some(names) = self.names(path) else { return };
                let at = self.find(&names);
                if let Node::File { now, synced } = &mut self.nodes[at] {
                    *synced = Some(now.clone());
                }
            }
            Step::SyncDir(path) => {
                let Some(names) = self.names(path) else { return };
                let at = self.find(&names);
                if let Node::Dir { now, synced } = &mut self.nodes[at] {
                    synced.clone_from(now);
                }
            }
            Step::Rename(from, to) => {
                let Some(node) = self.take(from) else { return };
                let names = self.names(to).unwrap();
                let (name, above) = names.split_last().unwrap();
                let at = self.find(above);
                self.entries(at).insert(name.clone(), node);
            }
            Step::Remove(path) => drop(self.take(path)),
        }
    }

    /// Writes what a cut leaves to a folder.
    fn leave(&self, unsynced: Unsynced, at: usize, to: &Path) {
        match &self.nodes[at] {
            Node::File { now, synced } => {
                let content = match unsynced {
                    Unsynced::Stays => now.clone(),
                    Unsynced::Goes | Unsynced::NamesStay => synced.clone().unwrap_or_default(),
                };
                std::fs::write(to, content).unwrap();
            }
            Node::Dir { now, synced } => {
                std::fs::create_dir_all(to).unwrap();
                let entries = match unsynced {
                    Unsynced::Stays | Unsynced::NamesStay => now,
                    Unsynced::Goes => synced,
                };
                entries.iter().for_each(|(name, node)| self.leave(unsynced, *node, &to.join(name)));
            }
        }
    }
}

/// Each step of two epochs' writing, those that stop an epoch's saving among them, is the last that
/// the disk saw: of what nobody waited for all is there, nothing, or the names alone. Everything
/// that is left goes on, to the bits of the unbroken run.
#[test]
fn a_power_cut_after_any_step_leaves_a_run_that_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().canonicalize().unwrap();
    let run = dir.join("run");
    record();
    train(Job::new(options().resolve().unwrap(), &run), &Silent).unwrap();
    let steps: Vec<Step> = recorded();
    let expected = outcome(&run);
    let mut disk = Disk::new(&run);
    let (mut cuts, mut anew, mut last) = (0, 0, 0);
    let own = steps.iter().filter(|step| {
        let (Step::MakeDir(path)
        | Step::Write(path, _)
        | Step::SyncFile(path)
        | Step::Rename(path, _)
        | Step::SyncDir(path)
        | Step::Remove(path)) = step;
        path.starts_with(&run)
    });
    let every = cases(19, 1);
    for (i, step) in own.enumerate() {
        disk.apply(step);
        last = i + 1;
        for unsynced in [Unsynced::Stays, Unsynced::Goes, Unsynced::NamesStay] {
            if !(i + unsynced as usize).is_multiple_of(every) {
                continue;
            }
            cuts += 1;
            let left = dir.join("left");
            disk.leave(unsynced, 0, &left);
            let job = if left.join("settings.toml").exists() {
                Job::resume(&Options::default(), &left).unwrap()
            } else {
                anew += 1;
                Job::new(options().resolve().unwrap(), &left)
            };
            let end = train(job, &Silent);
            end.unwrap_or_else(|e| panic!("step {i}, {step:?}, {unsynced:?}: {e:#}"));
            assert!(outcome(&left) == expected, "step {i}, {unsynced:?}");
            std::fs::remove_dir_all(&left).unwrap();
        }
    }
    assert!(last > 100, "{last} steps: what a run does to the disk goes through io::disk");
    println!("{cuts} power cuts in {last} steps; {anew} before there was anything to go on from");
}
