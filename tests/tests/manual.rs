//! The examples of `docs/images.md`, run one after the other: what they print is what the manual says.

use std::path::Path;
use std::process::{Command, Stdio};

use tempfile::TempDir;
use vmm_tests::guest;

/// A command and the lines that it prints.
struct Example {
    command: String,
    output: Vec<String>,
}

fn examples(manual: &str) -> Vec<Example> {
    let mut examples: Vec<Example> = Vec::new();
    let mut inside = false;
    for line in manual.lines() {
        match (inside, line.strip_prefix("$ ")) {
            (_, _) if line.starts_with("```") => inside = line == "```console",
            (false, _) => {}
            (true, Some(command)) => {
                examples.push(Example { command: command.to_owned(), output: Vec::new() });
            }
            (true, None) => {
                examples.last_mut().expect("output stands below its command").output.push(line.to_owned());
            }
        }
    }
    examples
}

/// A line without what is different each time, or on another file system: UUIDs, dates and what is allocated.
fn plain(line: &str) -> String {
    let shape = |word: &str| -> String {
        word.chars().map(|c| if c.is_ascii_hexdigit() { 'x' } else { c }).collect()
    };
    let is_date = |word: &&str| shape(word) == "xxxx-xx-xx";
    if let Some(date) = line.split(' ').find(is_date) {
        // Behind it come the time and what is allocated.
        let (before, behind) = line.split_once(date).unwrap();
        let rest: Vec<_> = behind.split_whitespace().skip(2).collect();
        return format!("{before}{}", rest.join(" "));
    }
    let mut words = line.split_whitespace();
    if words.next() == Some("allocated") {
        return "allocated".to_owned();
    }
    let line = line.replace("\"allocated\":0,", "").replace("\"allocated\":4096,", "");
    let is_uuid = |word: &str| shape(word) == "xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx";
    line.split(' ').filter(|word| !is_uuid(word)).collect::<Vec<_>>().join(" ")
}

#[test]
fn examples_of_the_manual_print_what_it_says() {
    let manual = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/images.md");
    let examples = examples(&std::fs::read_to_string(manual).unwrap());
    assert!(examples.len() >= 30, "{} examples", examples.len());
    let place = TempDir::new().unwrap();
    let disks = place.path().canonicalize().unwrap().join("disks");
    std::fs::create_dir(&disks).unwrap();
    // The binary may have any name; the manual calls it vmm.
    let programs = place.path().join("bin");
    std::fs::create_dir(&programs).unwrap();
    std::os::unix::fs::symlink(guest::vmm_binary().unwrap().canonicalize().unwrap(), programs.join("vmm"))
        .unwrap();
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
    for Example { command, output } in examples {
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("exec 2>&1; {command}")]).current_dir(&disks).stdin(Stdio::null());
        shell.env("PATH", &path).env("VMM_RUN_DIR", place.path().join("run"));
        let printed = shell.output().unwrap().stdout;
        let printed = String::from_utf8(printed).unwrap().replace(disks.to_str().unwrap(), "/srv/disks");
        let printed: Vec<_> = printed.lines().map(plain).collect();
        let wanted: Vec<_> = output.iter().map(|line| plain(line)).collect();
        assert_eq!(printed, wanted, "{command}");
    }
}

#[test]
fn what_differs_each_time_is_left_out_and_nothing_else() {
    assert_eq!(plain("fresh  2026-11-24 11:15Z  12K  just installed"), "fresh  just installed");
    assert_eq!(plain("allocated     12K"), "allocated");
    assert_eq!(plain("size          12K"), "size          12K");
    assert_eq!(
        plain("uuid          fca669de-163f-4fbe-9e89-999aded7848e"),
        plain("uuid          00000000-163f-4fbe-9e89-999aded7848e")
    );
    assert_ne!(plain("they differ at byte 5000"), plain("they differ at byte 5001"));
}
