//! What `ARCHITECTURE.md` says of who knows whom, as far as manifests and imports show it.

mod cycles;
mod modules;
mod tokens;

use std::path::{Path, PathBuf};

use toml_edit::{DocumentMut, Item};

use modules::Crate;

fn workspace() -> PathBuf {
    env!("CARGO_MANIFEST_DIR").into()
}

/// Folders of the workspace's packages; the root package is the empty one.
fn packages() -> Vec<String> {
    let manifest = manifest("");
    let members = manifest["workspace"]["members"].as_array().expect("members");
    let members = members.iter().map(|member| member.as_str().expect("a folder").to_string());
    members.chain([String::new()]).collect()
}

fn manifest(package: &str) -> DocumentMut {
    let path = workspace().join(package).join("Cargo.toml");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.parse().unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// What a package needs to be built: dependencies of every platform, but not of tests.
fn dependencies(package: &str) -> Vec<String> {
    let manifest = manifest(package);
    let names = |item: Option<&Item>| -> Vec<String> {
        let table = item.and_then(Item::as_table_like);
        table.map_or_else(Vec::new, |table| table.iter().map(|(name, _)| name.to_string()).collect())
    };
    let mut found = Vec::new();
    for kind in ["dependencies", "build-dependencies"] {
        found.extend(names(manifest.get(kind)));
        let targets = manifest.get("target").and_then(Item::as_table_like);
        for (_, target) in targets.into_iter().flat_map(|table| table.iter()) {
            found.extend(names(target.get(kind)));
        }
    }
    found
}

#[test]
fn crates_depend_one_way() {
    let siblings: &[(&str, &[&str])] = &[
        ("kernels", &[]),
        ("store", &[]),
        ("learn", &["kernels"]),
        ("lm", &["kernels"]),
        ("actors", &["kernels", "learn", "lm", "store"]),
    ];
    for package in packages().iter().filter(|package| !package.is_empty()) {
        let (_, allowed) = siblings
            .iter()
            .find(|(name, _)| name == package)
            .unwrap_or_else(|| panic!("say here what `{package}` may depend on"));
        for dependency in dependencies(package) {
            let sibling = dependency.strip_prefix("rehearsal-").unwrap_or_default();
            assert!(dependency != "rehearsal", "`{package}` depends on the product");
            assert!(sibling.is_empty() || allowed.contains(&sibling), "`{package}` depends on `{sibling}`");
        }
    }
}

#[test]
fn one_crate_knows_what_it_hides() {
    for (hidden, owner) in [("ractor", "actors"), ("ractor_cluster", "actors"), ("sled", "store")] {
        for package in packages().iter().filter(|package| *package != owner) {
            let known = dependencies(package).contains(&hidden.to_string());
            assert!(!known, "only `{owner}` may know {hidden}, and `{package}` depends on it");
        }
    }
}

/// Panics with a shortest cycle of each group of files that import one another.
fn has_no_cycles(root: &str) {
    let root = workspace().join(root);
    let imports = Crate::read(&root).imports();
    let folder = root.parent().unwrap();
    let groups = cycles::groups(&imports).into_iter().filter(|group| !cycles::is_pair_of_a_folder(group));
    let described: Vec<String> = groups
        .map(|group| {
            let name = |file: &PathBuf| file.strip_prefix(folder).unwrap_or(file).display().to_string();
            let names: Vec<String> = group.iter().map(name).collect();
            let cycle = cycles::shortest(&imports, &group, folder);
            format!("{} files: {}\nof which a shortest cycle is\n{cycle}", group.len(), names.join(", "))
        })
        .collect();
    assert!(described.is_empty(), "{} files import one another\n{}", root.display(), described.join("\n"));
}

#[test]
fn no_import_cycles_in_runtime() {
    has_no_cycles("runtime/lib.rs");
}

#[test]
fn no_import_cycles_in_lm() {
    has_no_cycles("lm/src/lib.rs");
}

#[test]
fn no_import_cycles_in_kernels() {
    if packages().iter().any(|package| package == "kernels") {
        has_no_cycles("kernels/src/lib.rs");
    }
}

/// A crate of a few files, each with its text.
fn written(files: &[(&str, &str)]) -> (tempfile::TempDir, modules::Imports) {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let file = folder.path().join(name);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, text).unwrap();
    }
    let imports = Crate::read(&folder.path().join("lib.rs")).imports();
    let short = |file: &Path| file.strip_prefix(folder.path()).unwrap().to_path_buf();
    let imports = imports
        .into_iter()
        .map(|(file, of)| (short(&file), of.into_iter().map(|(to, path)| (short(&to), path)).collect()))
        .collect();
    (folder, imports)
}

#[test]
fn imports_are_read_from_uses_and_paths() {
    let (_folder, imports) = written(&[
        ("lib.rs", "mod a; mod b; pub mod c; mod d; pub use a::{A, c as other}; pub use c::{Deep};"),
        // Text, comments and tests import nothing.
        (
            "a.rs",
            "/* crate::b::B */ // crate::d\npub struct A<'a>(&'a str, char); const T: &str = \"crate::b\"; \
          const Q: (char, &str) = ('\"', r#\"crate::d::\"#); #[cfg(test)] mod tests { use crate::d::D; } pub fn c() {}",
        ),
        ("b.rs", "use crate::{Deep as D, c::{self, inner}}; fn f() { inner::g(); c::h(); }"),
        ("c/mod.rs", "pub mod inner; pub(crate) use inner::Deep; pub fn h() {}"),
        ("c/inner.rs", "use super::h; pub struct Deep; pub fn g() { super::super::a::c(); crate::other() }"),
        ("d.rs", "mod m { use super::E; } use crate::b::*; pub struct E;"),
    ]);
    let of = |file: &str| -> Vec<String> {
        imports[Path::new(file)].keys().map(|to| to.to_str().unwrap().replace('\\', "/")).collect()
    };
    assert_eq!(of("lib.rs"), Vec::<String>::new(), "re-exports are no imports");
    assert_eq!(of("a.rs"), Vec::<String>::new());
    assert_eq!(of("b.rs"), ["c/inner.rs", "c/mod.rs"]);
    assert_eq!(of("c/mod.rs"), Vec::<String>::new());
    assert_eq!(of("c/inner.rs"), ["a.rs", "c/mod.rs"]);
    assert_eq!(of("d.rs"), ["b.rs"]);
    assert!(cycles::groups(&imports).is_empty());
}

#[test]
fn cycles_are_found_and_pairs_of_a_folder_excused() {
    let (_folder, imports) = written(&[
        ("lib.rs", "mod a; mod b; mod c; mod d; mod e;"),
        ("a.rs", "use crate::b::B;"),
        ("b.rs", "use crate::c::C; pub struct B;"),
        ("c/mod.rs", "mod x; pub struct C; use x::X; use crate::d::D;"),
        ("c/x.rs", "pub struct X; use super::C;"),
        ("d.rs", "pub struct D; use crate::a::A;"),
        ("e/mod.rs", "mod y; pub struct E; fn f() { y::g() }"),
        ("e/y.rs", "pub fn g() -> super::E {}"),
    ]);
    let groups = cycles::groups(&imports);
    assert_eq!(groups.iter().map(std::collections::BTreeSet::len).collect::<Vec<_>>(), [5, 2]);
    assert!(!cycles::is_pair_of_a_folder(&groups[0]) && cycles::is_pair_of_a_folder(&groups[1]));
    let cycle = cycles::shortest(&imports, &groups[0], Path::new(""));
    assert!(cycle.contains("c/mod.rs imports c/x.rs (c::x::X)"), "{cycle}");
}
