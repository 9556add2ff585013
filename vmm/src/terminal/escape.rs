//! Keys for the monitor among the keys for the guest.
//!
//! ```text
//!              Ctrl-]                     q, b or ?
//!   ┌───────┐ ────────────▶ ┌─────────┐ ────────────▶ an action
//!   │ guest │               │ escaped │
//!   └───────┘ ◀──────────── └─────────┘ ────────────▶ one Ctrl-] for the guest
//!     any other key for the guest           Ctrl-]
//!     (after Ctrl-]: both)
//! ```

/// Ctrl-]
const ESCAPE: u8 = 0x1d;

/// What the keys do, for people; lines end so that they look right on a raw terminal, too.
pub const HELP: &str = "\r\nCtrl-] then:  q  stop the guest at once\r\n              \
    b  press its power button\r\n              \
    ?  this list\r\n         Ctrl-]  send Ctrl-] to the guest\r\n";

/// What somebody at the terminal asks the monitor to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Stop the guest at once, as if its power were cut (`q`).
    Stop,
    /// Press the guest's power button (`b`).
    PowerButton,
    /// Show [`HELP`] (`?`).
    Help,
}

/// Takes the monitor's keys out of what is typed.
#[derive(Debug, Clone, Default)]
pub struct Escape {
    escaped: bool,
}

impl Escape {
    /// Appends what is for the guest to `guest`, and returns what is for the monitor, in the order typed. A
    /// Ctrl-] at the end of `typed` is kept until the next call.
    pub fn feed(&mut self, typed: &[u8], guest: &mut Vec<u8>) -> Vec<Action> {
        let mut actions = Vec::new();
        for byte in typed {
            match (std::mem::take(&mut self.escaped), *byte) {
                (false, ESCAPE) => self.escaped = true,
                (true, b'q') => actions.push(Action::Stop),
                (true, b'b') => actions.push(Action::PowerButton),
                (true, b'?') => actions.push(Action::Help),
                (false, byte) | (true, byte @ ESCAPE) => guest.push(byte),
                (true, byte) => guest.extend([ESCAPE, byte]),
            }
        }
        actions
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn feed(typed: &[&[u8]]) -> (Vec<u8>, Vec<Action>) {
        let (mut escape, mut guest) = (Escape::default(), Vec::new());
        let actions = typed.iter().flat_map(|part| escape.feed(part, &mut guest)).collect();
        (guest, actions)
    }

    #[test]
    fn keys_without_escape_are_the_guests() {
        assert_eq!(feed(&[b"qb?\x03\x1a\r"]), (b"qb?\x03\x1a\r".to_vec(), vec![]));
    }

    #[test]
    fn escaped_letters_are_actions_and_do_not_reach_the_guest() {
        let typed: &[u8] = b"a\x1dqb\x1db\x1d?c";
        assert_eq!(feed(&[typed]), (b"abc".to_vec(), vec![Action::Stop, Action::PowerButton, Action::Help]));
    }

    #[test]
    fn escape_twice_is_one_for_the_guest() {
        assert_eq!(feed(&[b"\x1d\x1dq"]), (b"\x1dq".to_vec(), vec![]));
        assert_eq!(feed(&[b"\x1d\x1d\x1dq"]), (b"\x1d".to_vec(), vec![Action::Stop]));
    }

    #[test]
    fn escape_before_another_key_passes_with_it() {
        assert_eq!(feed(&[b"\x1dx\x1dQ"]), (b"\x1dx\x1dQ".to_vec(), vec![]));
    }

    #[test]
    fn help_names_every_action() {
        for typed in ["q", "b", "?"] {
            assert!(HELP.contains(&format!(" {typed}  ")), "{typed}");
        }
    }

    proptest! {
        #[test]
        fn it_does_not_matter_how_the_keys_are_cut_into_reads(
            typed in prop::collection::vec(prop::sample::select(b"\x1d\x1d\x1dqb?ax".to_vec()), 0..40),
            cut in any::<prop::sample::Index>(),
        ) {
            let cut = cut.index(typed.len() + 1);
            prop_assert_eq!(feed(&[&typed]), feed(&[&typed[..cut], &typed[cut..]]));
        }

        #[test]
        fn keys_of_a_sender_that_doubles_its_escapes_all_arrive(typed in prop::collection::vec(any::<u8>(), 0..100)) {
            let doubled: Vec<u8> =
                typed.iter().flat_map(|byte| vec![*byte; if *byte == ESCAPE { 2 } else { 1 }]).collect();
            prop_assert_eq!(feed(&[&doubled]), (typed, vec![]));
        }
    }
}
