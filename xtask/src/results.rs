//! What test programs print (libtest's plain format), read back.

/// How a test came out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Result {
    /// It passed.
    Passed,
    /// It failed.
    Failed,
    /// It was not run, for this reason.
    Ignored(String),
}

/// Reads `test NAME ... RESULT`.
pub fn parse(line: &str) -> Option<(&str, Result)> {
    let (name, result) = line.strip_prefix("test ")?.rsplit_once(" ... ")?;
    let result = match result.split_once(", ").map_or((result, ""), |(word, reason)| (word, reason)) {
        ("ok", _) => Result::Passed,
        ("FAILED", _) => Result::Failed,
        ("ignored", reason) => Result::Ignored(reason.to_owned()),
        _ => return None,
    };
    Some((name.strip_suffix(" - should panic").unwrap_or(name), result))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_read_with_names_and_reasons() {
        assert_eq!(parse("test a::b ... ok"), Some(("a::b", Result::Passed)));
        assert_eq!(parse("test a - should panic ... FAILED"), Some(("a", Result::Failed)));
        let ignored = Result::Ignored("needs root, tun and x".to_owned());
        assert_eq!(parse("test a ... ignored, needs root, tun and x"), Some(("a", ignored)));
        assert_eq!(parse("test a ... ignored"), Some(("a", Result::Ignored(String::new()))));
    }

    #[test]
    fn other_lines_are_no_results() {
        for line in
            ["", "running 5 tests", "test result: ok. 5 passed; 0 failed", "test a has been running for 60 s"]
        {
            assert_eq!(parse(line), None, "{line}");
        }
    }
}
