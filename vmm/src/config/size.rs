//! Sizes as people write them.

/// Reads `"512M"`: a whole number of bytes with a suffix K, M, G or T, which are powers of 1024.
///
/// # Errors
///
/// What would be right.
pub fn parse(text: &str) -> Result<u64, String> {
    let wrong = || "a size is a whole number with K, M, G or T, as in \"512M\"".to_owned();
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "K" | "k" | "KiB" => 10,
        "M" | "m" | "MiB" => 20,
        "G" | "g" | "GiB" => 30,
        "T" | "t" | "TiB" => 40,
        _ => return Err(wrong()),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(wrong());
    }
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

/// Writes `bytes` in the largest unit that leaves a whole number.
pub fn show(bytes: u64) -> String {
    let (shift, unit) = [(40, "T"), (30, "G"), (20, "M"), (10, "K")]
        .into_iter()
        .find(|(shift, _)| bytes != 0 && bytes.trailing_zeros() >= *shift)
        .unwrap_or((0, ""));
    format!("{}{unit}", bytes >> shift)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn suffixes_are_powers_of_1024() {
        for (text, bytes) in [("1K", 1 << 10), ("512M", 512 << 20), ("3G", 3 << 30), ("2TiB", 2 << 40)] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn numbers_without_unit_signs_fractions_and_overflow_are_refused() {
        for text in ["", "M", "512", "-1M", "1.5G", "1 G", "0x10M", "99999999999T", "1E", "1MM", "+1M"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_size_or_refused(text in "\\PC{0,20}") {
            let _: Result<u64, String> = parse(&text);
        }

        #[test]
        fn what_is_shown_is_read_back(number in 1_u64..1 << 20, shift in 1_u32..5) {
            let bytes = number << (10 * shift);
            prop_assert_eq!(parse(&show(bytes)), Ok(bytes));
        }
    }
}
