//! `fio` on the host, with the file that the guests have: what the host gives to a program that does nothing else.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use super::Figures;
use super::cases::Case;

/// Runs `case` on `file` for `seconds`.
///
/// # Errors
///
/// Why there are no figures.
pub fn run(program: &Path, case: &Case, file: &Path, size: u64, seconds: u32) -> Result<Figures, String> {
    let output = command(program, case, file, size, seconds)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("cannot run {}: {error}", program.display()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("fio ended with {}: {}", output.status, said.trim()));
    }
    // It may say something else first.
    let start = output.stdout.iter().position(|byte| *byte == b'{').unwrap_or(0);
    let report = serde_json::from_slice(&output.stdout[start..])
        .map_err(|error| format!("the report of fio is not understood: {error}"))?;
    figures(case, &report).ok_or_else(|| "the report of fio has no figures".to_owned())
}

/// Where it is.
///
/// # Errors
///
/// What was looked for.
pub fn find() -> Result<PathBuf, String> {
    crate::systems::tool("fio", "FIO")
}

fn command(program: &Path, case: &Case, file: &Path, size: u64, seconds: u32) -> Command {
    let mut command = Command::new(program);
    let kind = match (case.random, case.writes) {
        (true, false) => "randread",
        (true, true) => "randwrite",
        (false, false) => "read",
        (false, true) => "write",
    };
    // The page cache is left as it is, and no time is spent on statistics and on remembering places.
    command.args(["--name=limit", "--ioengine=io_uring", "--invalidate=0", "--time_based", "--norandommap"]);
    command.args(["--fixedbufs=1", "--registerfiles=1", "--gtod_reduce=1", "--randrepeat=0"]);
    command.args(["--thread", "--allow_file_create=0", "--output-format=json"]);
    command.arg(format!("--rw={kind}")).arg(format!("--bs={}", case.size));
    command.arg(format!("--iodepth={}", case.depth)).arg(format!("--direct={}", u8::from(case.is_direct())));
    if case.depth > 1 {
        // Many at a time, as a guest has them submitted; one by one is not what the host can do.
        command.arg(format!("--iodepth_batch_submit={}", case.depth / 2));
        command.arg("--iodepth_batch_complete_min=1");
        command.arg(format!("--iodepth_batch_complete_max={}", case.depth));
    }
    command.arg(format!("--runtime={seconds}")).arg(format!("--size={size}"));
    if case.flush {
        command.arg("--fdatasync=1");
    }
    // A colon separates files.
    let name = file.to_string_lossy().replace(':', "\\:");
    command.arg(format!("--filename={name}"));
    command
}

fn figures(case: &Case, report: &Value) -> Option<Figures> {
    let job = report["jobs"].get(0)?;
    let direction = &job[if case.writes { "write" } else { "read" }];
    let (iops, count) = (direction["iops"].as_f64()?, direction["total_ios"].as_f64()?);
    let percent = job["usr_cpu"].as_f64()? + job["sys_cpu"].as_f64()?;
    let busy_us = percent / 100.0 * job["job_runtime"].as_f64()? * 1000.0;
    (count > 0.0).then(|| Figures { iops, cpu_us: busy_us / count })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::cases::ALL;
    use serde_json::json;

    #[test]
    fn figures_are_those_of_the_direction() {
        let report = json!({"jobs": [{
            "job_runtime": 1000, "usr_cpu": 25.0, "sys_cpu": 50.0,
            "read": {"iops": 7500.0, "total_ios": 7500}, "write": {"iops": 0.0, "total_ios": 0},
        }]});
        let read = figures(&ALL[0], &report).unwrap();
        assert!((read.iops - 7500.0).abs() < 1e-9 && (read.cpu_us - 100.0).abs() < 1e-9, "{read:?}");
        assert!(figures(&ALL[2], &report).is_none(), "nothing was written");
        assert!(figures(&ALL[0], &json!({})).is_none());
    }

    #[test]
    fn flush_follows_every_write_where_the_case_says_so() {
        let has = |case: &Case| {
            let command = command(Path::new("fio"), case, Path::new("/a:b"), 1 << 20, 1);
            let words: Vec<_> = command.get_args().map(|word| word.to_string_lossy().into_owned()).collect();
            assert!(words.contains(&"--filename=/a\\:b".to_owned()), "{words:?}");
            words.contains(&"--fdatasync=1".to_owned())
        };
        let flushing: Vec<_> = ALL.iter().filter(|case| has(case)).map(|case| case.name).collect();
        assert_eq!(flushing, ["write-flush-4k"]);
    }

    #[test]
    fn program_that_fails_or_says_nothing_has_no_figures() {
        let run = |program: &str| run(Path::new(program), &ALL[0], Path::new("/x"), 1, 1).unwrap_err();
        assert!(run("/nonexistent/fio").contains("/nonexistent/fio"));
        assert!(run("/bin/false").contains("exit status: 1"));
        assert!(run("/bin/true").contains("not understood"));
    }
}
