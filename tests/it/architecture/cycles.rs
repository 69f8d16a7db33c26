//! Import cycles among files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::modules::Imports;

/// Groups of files in which each imports each other, directly or not; largest first.
pub fn groups(imports: &Imports) -> Vec<BTreeSet<PathBuf>> {
    let reached: BTreeMap<&PathBuf, BTreeSet<&PathBuf>> =
        imports.keys().map(|file| (file, reachable(imports, file))).collect();
    let mut groups = BTreeSet::new();
    for (file, there) in &reached {
        let both = there.iter().filter(|other| reached[**other].contains(file));
        let group: BTreeSet<PathBuf> = both.map(|other| (*other).clone()).collect();
        if group.len() > 1 {
            groups.insert(group);
        }
    }
    let mut groups: Vec<_> = groups.into_iter().collect();
    groups.sort_by_key(|group| std::cmp::Reverse(group.len()));
    groups
}

/// Files that a file imports, directly or not; itself only if it is in a cycle.
fn reachable<'a>(imports: &'a Imports, from: &PathBuf) -> BTreeSet<&'a PathBuf> {
    let mut found = BTreeSet::new();
    let mut open: Vec<&PathBuf> = imports[from].keys().collect();
    while let Some(file) = open.pop() {
        if found.insert(file) {
            open.extend(imports[file].keys());
        }
    }
    found
}

/// Whether a group is two files of one folder, one of which may be the folder's own.
pub fn is_pair_of_a_folder(group: &BTreeSet<PathBuf>) -> bool {
    let folder = |file: &Path| file.parent().map(Path::to_path_buf);
    let own = |file: &Path| Some(file.with_extension(""));
    match group.iter().collect::<Vec<_>>().as_slice() {
        [a, b] => folder(a) == folder(b) || own(a) == folder(b) || own(b) == folder(a),
        _ => false,
    }
}

/// A shortest cycle within a group, one import a line.
pub fn shortest(imports: &Imports, group: &BTreeSet<PathBuf>, root: &Path) -> String {
    let cycles = group.iter().filter_map(|file| back_to(imports, group, file));
    let Some(cycle) = cycles.min_by_key(Vec::len) else { return String::new() };
    let name = |file: &Path| file.strip_prefix(root).unwrap_or(file).display().to_string();
    let line =
        |pair: &[&PathBuf]| format!("  {} imports {} ({})", name(pair[0]), name(pair[1]), imports[pair[0]][pair[1]]);
    cycle.windows(2).map(line).collect::<Vec<_>>().join("\n")
}

/// The shortest way from a file over the group back to it.
fn back_to<'a>(imports: &'a Imports, group: &BTreeSet<PathBuf>, file: &'a PathBuf) -> Option<Vec<&'a PathBuf>> {
    let mut ways = std::collections::VecDeque::from([vec![file]]);
    let mut seen = BTreeSet::new();
    while let Some(way) = ways.pop_front() {
        for next in imports[way[way.len() - 1]].keys().filter(|next| group.contains(*next)) {
            let longer = [way.as_slice(), &[next]].concat();
            if next == file {
                return Some(longer);
            }
            if seen.insert(next) {
                ways.push_back(longer);
            }
        }
    }
    None
}
