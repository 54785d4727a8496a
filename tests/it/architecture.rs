//! The house: who imports whom, as ARCHITECTURE.md's table says; no circles; only the command line
//! prints; files that can be read.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// A source file below src/.
struct Source {
    /// `ops/ddim_step.rs`
    path: PathBuf,
    /// Without comments and unit tests.
    code: String,
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// All files with an ending below a folder.
fn files(dir: &Path, ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path, ending));
        } else if path.extension().is_some_and(|e| e == ending) {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn sources() -> Vec<Source> {
    let src = root().join("src");
    let source = |path: PathBuf| {
        let text = std::fs::read_to_string(&path).unwrap();
        let text = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        let code: Vec<&str> = text.lines().filter(|l| !l.trim_start().starts_with("//")).collect();
        Source { path: path.strip_prefix(&src).unwrap().to_path_buf(), code: code.join("\n") }
    };
    files(&src, "rs").into_iter().map(source).collect()
}

impl Source {
    /// Its module's path: `["ops", "ddim_step"]`.
    fn module(&self) -> Vec<String> {
        let mut parts: Vec<String> =
            self.path.with_extension("").iter().map(|p| p.to_str().unwrap().into()).collect();
        if parts.last().is_some_and(|p| p == "mod") {
            parts.pop();
        }
        parts
    }

    /// The folder, or the file at the top, that it belongs to.
    fn folder(&self) -> String {
        self.module()[0].clone()
    }

    /// The files that it imports: by `use`, and by paths that begin with `crate::` or `super::`.
    fn imports(&self) -> BTreeSet<PathBuf> {
        let mut paths = Vec::new();
        for statement in self.code.split(';') {
            let start = ["pub use ", "pub(crate) use ", "use "]
                .iter()
                .find_map(|s| statement.rfind(&format!("\n{s}")).map(|i| i + 1 + s.len()));
            if let Some(start) = start {
                expand("", &statement[start..], &mut paths);
            }
        }
        let inline = ["crate::", "super::"].into_iter().flat_map(|s| self.code.match_indices(s));
        // The second `super` of a path is no beginning.
        for (i, _) in inline.filter(|(i, _)| !self.code[..*i].ends_with(':')) {
            let path: String = self.code[i..]
                .chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_' || *c == ':')
                .collect();
            // A group is read with its `use`; what stands before it is enough elsewhere.
            let path = path.trim_end_matches("::");
            if !["crate", "super"].contains(&path) {
                paths.push(path.to_string());
            }
        }
        paths.iter().filter_map(|p| self.resolve(p)).filter(|p| *p != self.path).collect()
    }

    /// The file that a path leads to, if it is one of ours.
    fn resolve(&self, path: &str) -> Option<PathBuf> {
        let mut at = self.module();
        let mut segments = path.split("::").peekable();
        match segments.next()? {
            "crate" => at.clear(),
            "self" => {}
            "super" => drop(at.pop()),
            _ => return None,
        }
        while segments.next_if_eq(&"super").is_some() {
            at.pop();
        }
        let src = root().join("src");
        for segment in segments {
            let dir: PathBuf = at.iter().collect();
            let file = dir.join(segment).with_extension("rs");
            if src.join(&file).is_file() {
                return Some(file);
            }
            if !src.join(&dir).join(segment).join("mod.rs").is_file() {
                break;
            }
            at.push(segment.into());
        }
        (!at.is_empty()).then(|| at.iter().collect::<PathBuf>().join("mod.rs"))
    }
}

/// The paths of a `use` with braces in it.
fn expand(prefix: &str, rest: &str, paths: &mut Vec<String>) {
    let rest = rest.trim();
    let Some(open) = rest.find('{') else {
        for path in rest.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            let path = path.split(" as ").next().unwrap();
            paths.push(format!("{prefix}{path}").trim_end_matches("::self").to_string());
        }
        return;
    };
    // What stands before the group's own path, then the group, then what follows it.
    let start = rest[..open].rfind(',').map_or(0, |i| i + 1);
    expand(prefix, &rest[..start], paths);
    let mut depth = 0;
    let close = open
        + rest[open..]
            .find(|c| {
                depth += i32::from(c == '{') - i32::from(c == '}');
                depth == 0
            })
            .unwrap();
    let own = format!("{prefix}{}", rest[start..open].trim());
    expand(&own, &rest[open + 1..close], paths);
    expand(prefix, rest[close + 1..].trim_start_matches(','), paths);
}

/// ARCHITECTURE.md's table: what each folder imports directly.
fn table() -> BTreeMap<String, BTreeSet<String>> {
    let text = std::fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let begin = text.find("| folder | may import |").expect("the table of imports");
    let names = |cell: &str| -> Vec<String> {
        cell.split('`').skip(1).step_by(2).map(str::to_string).collect()
    };
    let rows = text[begin..].lines().skip(2).take_while(|l| l.starts_with('|'));
    let mut table = BTreeMap::new();
    for row in rows {
        let cells: Vec<&str> = row.split('|').collect();
        for folder in names(cells[1]) {
            table.insert(folder, names(cells[2]).into_iter().collect());
        }
    }
    table
}

/// A folder and everything below it.
fn below(table: &BTreeMap<String, BTreeSet<String>>, folder: &str) -> BTreeSet<String> {
    let mut all = BTreeSet::from([folder.to_string()]);
    for next in &table[folder] {
        all.extend(below(table, next));
    }
    all
}

#[test]
fn imports_are_those_of_the_table_and_run_down_only() {
    let table = table();
    assert!(table.len() >= 15, "{table:?}");
    // The table itself has no circle: each folder stands above all that it imports.
    let order: Vec<&String> = table.keys().collect();
    for folder in order {
        for next in &table[folder] {
            assert!(!below(&table, next).contains(folder), "{folder} and {next} form a circle");
        }
    }
    let mut seen = BTreeSet::new();
    for source in sources() {
        let folder = source.folder();
        if folder == "main" || folder == "lib" {
            continue;
        }
        seen.insert(folder.clone());
        let allowed = below(&table, &folder);
        for import in source.imports() {
            let target = Source { path: import.clone(), code: String::new() }.folder();
            assert!(
                allowed.contains(&target),
                "{} imports {}; ARCHITECTURE.md lets {folder} import {:?}",
                source.path.display(),
                import.display(),
                table[&folder]
            );
        }
    }
    let listed: BTreeSet<String> = table.into_keys().collect();
    assert_eq!(seen, listed, "the table has every folder, and no other");
}

#[test]
fn no_files_form_a_circle() {
    let graph: BTreeMap<PathBuf, BTreeSet<PathBuf>> = sources()
        .into_iter()
        .filter(|s| !["main", "lib"].contains(&&*s.folder()))
        .map(|s| (s.path.clone(), s.imports()))
        .collect();
    assert!(graph.values().map(BTreeSet::len).sum::<usize>() > 100, "imports are found");
    // Files that import only what was taken away are taken away, until none is left.
    let mut left = graph;
    loop {
        let free: Vec<PathBuf> = left
            .iter()
            .filter(|(_, imports)| !imports.iter().any(|i| left.contains_key(i)))
            .map(|(path, _)| path.clone())
            .collect();
        if free.is_empty() {
            break;
        }
        free.iter().for_each(|path| drop(left.remove(path)));
    }
    let circle: Vec<String> = left
        .iter()
        .map(|(p, i)| {
            let inside: Vec<_> = i.iter().filter(|i| left.contains_key(*i)).collect();
            format!("{} -> {inside:?}", p.display())
        })
        .collect();
    assert!(left.is_empty(), "circles:\n{}", circle.join("\n"));
}

#[test]
fn a_use_with_nested_groups_is_read_whole() {
    let mut paths = Vec::new();
    expand("", "crate::{a::{self, b as c}, d, e::{f::{g, h}}}", &mut paths);
    assert_eq!(paths, ["crate::a", "crate::a::b", "crate::d", "crate::e::f::g", "crate::e::f::h"]);
}

#[test]
fn only_the_command_line_prints_and_exits() {
    for source in sources() {
        let folder = source.folder();
        for word in ["println!", "eprintln!", "print!(", "process::exit", "dbg!"] {
            let found = source.code.contains(word);
            let allowed = folder == "cli" || folder == "main";
            assert!(!found || allowed, "{}: {word}", source.path.display());
        }
    }
}

#[test]
fn files_can_be_read() {
    let folders = [("src", "rs"), ("shaders", "wgsl"), ("tests/it", "rs"), ("benches", "rs")];
    for (folder, ending) in folders {
        for path in files(&root().join(folder), ending) {
            let text = std::fs::read_to_string(&path).unwrap();
            let lines = text.lines().count();
            assert!(lines <= 400, "{}: {lines} lines; does it hold one thing?", path.display());
            for (i, line) in text.lines().enumerate() {
                let (width, at) = (line.chars().count(), i + 1);
                assert!(width <= 100, "{}: line {at} has {width} columns", path.display());
            }
        }
    }
}
