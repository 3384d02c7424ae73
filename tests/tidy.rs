//! The rules of the house that the compiler does not know: which module may import which, and where waiting, clocks, sockets
//! and files may be.

#![allow(clippy::unwrap_used, reason = "in a test, the assertion")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Every module of `src`, lowest layer first, with the modules it may import. An import points down: a module may only name
/// modules that stand above it in this list. `docs/architecture.md` explains the layers.
const LAYERS: &[(&str, &[&str])] = &[
    // L0: words and values. std and small crates only.
    ("model", &[]),
    ("partition", &["model"]),
    ("encoding", &["model"]),
    ("effect", &["model"]),
    ("disk", &[]),
    ("budget", &[]),
    ("config", &[]),
    ("metrics", &["encoding", "model"]),
    // L1: siblings that never import each other.
    ("wal", &["effect", "model"]),
    ("frame", &["disk", "effect"]),
    ("store", &["budget", "effect", "model", "partition"]),
    ("proto", &[]),
    (
        "protocol",
        &["config", "encoding", "metrics", "model", "partition", "proto"],
    ),
    // L2: what a command does.
    (
        "shard",
        &["budget", "effect", "metrics", "model", "partition", "store", "wal"],
    ),
    (
        "shards",
        &[
            "budget",
            "effect",
            "metrics",
            "model",
            "partition",
            "shard",
            "store",
            "wal",
        ],
    ),
    ("keeper", &["disk", "effect", "frame", "model", "wal"]),
    (
        "data_dir",
        &[
            "config",
            "disk",
            "effect",
            "frame",
            "keeper",
            "model",
            "partition",
            "wal",
        ],
    ),
    ("locks", &[]),
    ("txn", &["encoding", "locks", "model", "protocol"]),
    // L3: one connection, one core.
    ("gather", &["encoding", "metrics", "protocol", "txn"]),
    ("interactive", &["model"]),
    (
        "session",
        &["encoding", "gather", "interactive", "metrics", "model", "protocol"],
    ),
    ("sessions", &["session"]),
    ("link", &["encoding", "locks", "model", "partition", "protocol", "txn"]),
    (
        "engine",
        &[
            "budget",
            "config",
            "effect",
            "encoding",
            "gather",
            "interactive",
            "link",
            "locks",
            "metrics",
            "model",
            "partition",
            "protocol",
            "session",
            "sessions",
            "shard",
            "shards",
            "txn",
            "wal",
        ],
    ),
    // L4: the outside world.
    (
        "runtime",
        &[
            "budget",
            "config",
            "data_dir",
            "disk",
            "encoding",
            "engine",
            "keeper",
            "link",
            "model",
            "partition",
            "proto",
            "protocol",
            "wal",
        ],
    ),
    // L5: the other end of a connection, and the command lines.
    ("client", &["model", "partition", "proto"]),
    ("main", &["config", "protocol", "runtime"]),
    ("bin", &["client", "config", "partition", "proto"]),
];

/// Where anything that waits, or asks the outside world, is allowed: the runtime and the binaries.
const OUTSIDE: &[&str] = &["runtime", "main", "bin"];

/// Named exceptions, each with its reason.
const EXCEPTIONS: &[(&str, &str, &str)] = &[
    (
        "config",
        "std::net",
        "options hold addresses; a host name in one is looked up while the command line is read, before anything serves",
    ),
    (
        "client",
        "std::net",
        "it runs in its user's thread, and has no engine to keep from waiting",
    ),
    ("client", "Instant::now", "the same: a request must end in time"),
];

const BANNED: &[&str] = &[
    "async ",
    ".await",
    "std::fs",
    "std::net",
    "std::thread",
    "std::time::Instant",
    "std::time::SystemTime",
    "Instant::now",
    "SystemTime::now",
    "glommio",
    "io_uring",
    "libc::",
];

/// Modules with `unsafe`, each block with its SAFETY argument (which clippy demands).
const UNSAFE: &[&str] = &["store", "runtime"];

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Each module with its files' code, without comments and without the tests at a file's end.
fn modules() -> BTreeMap<String, Vec<(PathBuf, String)>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut paths = vec![];
    sources(&root, &mut paths);
    let mut modules: BTreeMap<String, Vec<(PathBuf, String)>> = BTreeMap::new();
    for path in paths {
        let relative = path.strip_prefix(&root).unwrap();
        let first = relative.components().next().unwrap().as_os_str().to_string_lossy();
        let module = first.trim_end_matches(".rs").to_owned();
        let text = std::fs::read_to_string(&path).unwrap();
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        let code: Vec<&str> = code
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"))
            .collect();
        modules.entry(module).or_default().push((path.clone(), code.join("\n")));
    }
    modules
}

#[test]
fn imports_point_down() {
    let known: Vec<&str> = LAYERS.iter().map(|(module, _)| *module).collect();
    for (number, (module, imports)) in LAYERS.iter().enumerate() {
        for import in *imports {
            let place = known.iter().position(|other| other == import).unwrap();
            assert!(
                place < number,
                "the table itself: {module} may not import {import}, which stands below it"
            );
        }
    }
    for (module, files) in modules() {
        if module == "lib" {
            continue;
        }
        let allowed = LAYERS.iter().find(|(name, _)| *name == module);
        let (_, allowed) = allowed.unwrap_or_else(|| panic!("{module} has no place in the table of layers"));
        for (path, code) in files {
            for other in known
                .iter()
                .filter(|other| **other != module && !allowed.contains(other))
            {
                for prefix in ["crate::", "memkv::"] {
                    let import = format!("{prefix}{other}::");
                    assert!(!code.contains(&import), "{} must not use {import}", path.display());
                }
            }
        }
    }
}

#[test]
fn nothing_waits_or_looks_outside_but_the_runtime() {
    for (module, files) in modules() {
        if OUTSIDE.contains(&module.as_str()) {
            continue;
        }
        for (path, code) in files {
            for word in BANNED {
                if EXCEPTIONS.iter().any(|(of, exempt, _)| *of == module && exempt == word) {
                    continue;
                }
                assert!(!code.contains(word), "{} must not contain {word:?}", path.display());
            }
        }
    }
}

#[test]
fn unsafe_stays_in_its_rooms() {
    for (module, files) in modules() {
        if UNSAFE.contains(&module.as_str()) {
            continue;
        }
        for (path, code) in files {
            assert!(
                !code.contains("unsafe"),
                "{} must not contain unsafe code",
                path.display()
            );
        }
    }
}

/// A file that grows past this hides a second thing: split it by the state it holds.
#[test]
fn files_stay_readable() {
    for (path, code) in modules().into_values().flatten() {
        let lines = code.lines().count();
        assert!(lines <= 1100, "{} has {lines} lines", path.display());
    }
}
