//! Times as people write them.

use std::time::Duration;

/// Reads `"2s"` or `"250ms"`: a whole number of seconds or milliseconds.
///
/// # Errors
///
/// What would be right.
pub fn parse(text: &str) -> Result<Duration, String> {
    let wrong = || "a time is a whole number with s or ms, as in \"2s\" or \"250ms\"".to_owned();
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(wrong());
    }
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    match &text[digits.len()..] {
        "s" => Ok(Duration::from_secs(number)),
        "ms" => Ok(Duration::from_millis(number)),
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn times_without_unit_signs_fractions_and_overflow_are_refused() {
        for text in ["", "s", "5", "-1s", "1.5s", "1 s", "99999999999999999999s", "1m", "1S", "1sms", "+1s"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_time_or_refused(text in "\\PC{0,20}") {
            let _: Result<Duration, String> = parse(&text);
        }

        #[test]
        fn seconds_are_a_thousand_milliseconds(number in 0_u64..1 << 50) {
            prop_assert_eq!(parse(&format!("{number}s")), parse(&format!("{number}000ms")));
            prop_assert_eq!(parse(&format!("{number}ms")), Ok(Duration::from_millis(number)));
        }
    }
}
