//! A guest's console, with somebody who types at its shell.

use std::time::Duration;

use crate::protocol::Status;
use crate::{Console, Error, L1, Result};

/// From power-on to the shell: some ten seconds in the emulated host on an idle machine.
pub const BOOT_DEADLINE: Duration = Duration::from_secs(240);
/// For a command in the guest that is done at once.
pub const COMMAND_DEADLINE: Duration = Duration::from_secs(60);

/// What the guest's start script says when all is up, followed by particulars.
const READY: &str = "guest is ready: ";

/// Takes the place of the shell: no prompt, no editing, and after each line its number and status.
const LOOP: &str =
    r#"while IFS= read -r line; do eval "$line" 2>&1; _s=$?; _n=$((_n+1)); echo "<$_n=$_s>"; done"#;

/// A guest that has booted from the files of [`crate::Artefacts`] and waits at its shell.
#[derive(Debug)]
pub struct Guest {
    console: Console,
    commands: u32,
    greeting: String,
}

impl Guest {
    /// Starts the guest that `config`, the text of a `vm.toml`, describes, in the emulated host.
    ///
    /// # Errors
    ///
    /// Whatever keeps it from coming to its shell, with the end of its console.
    pub fn start(l1: &L1, config: &str) -> Result<Self> {
        l1.write_file("/tmp/vm.toml", config.as_bytes())?;
        Self::attach(l1.spawn("exec vmm --config /tmp/vm.toml")?)
    }

    /// Waits for the guest on `console` and makes its shell fit for being driven: without echo and prompt.
    ///
    /// # Errors
    ///
    /// Whatever keeps it from coming to its shell, with the end of its console.
    pub fn attach(mut console: Console) -> Result<Self> {
        console.wait_for(READY, BOOT_DEADLINE)?;
        let greeting = console.wait_for("\n", COMMAND_DEADLINE)?;
        console.wait_for("# ", COMMAND_DEADLINE)?;
        console.send(&format!("stty -echo; exec sh -c '{LOOP}'\n"));
        let mut guest = Self { console, commands: 0, greeting };
        guest.run("true", COMMAND_DEADLINE)?;
        Ok(guest)
    }

    /// What the guest said of itself when it was up.
    #[must_use]
    pub fn greeting(&self) -> &str {
        &self.greeting
    }

    /// Runs `command`, one line, in the guest's shell; the second value is what it wrote.
    ///
    /// # Errors
    ///
    /// [`Error::Deadline`]; [`Error::Gone`] where the guest ended.
    pub fn run(&mut self, command: &str, deadline: Duration) -> Result<(i32, String)> {
        self.begin(command);
        self.finish(deadline)
    }

    /// Types `command`, one line, and leaves it to [`Guest::finish`] to wait for it.
    pub fn begin(&mut self, command: &str) {
        self.commands += 1;
        self.console.send(&format!("{command}\n"));
    }

    /// Waits for the command that was begun last: its status, and what it wrote.
    ///
    /// # Errors
    ///
    /// Those of [`Guest::run`].
    pub fn finish(&mut self, deadline: Duration) -> Result<(i32, String)> {
        let output = self.console.wait_for(&format!("<{}=", self.commands), deadline)?;
        let status = self.console.wait_for(">", COMMAND_DEADLINE)?;
        let status = status.parse().map_err(|_| Error::Unexpected {
            what: "status of a command".to_owned(),
            expected: "a number".to_owned(),
            found: status,
        })?;
        Ok((status, output.trim().to_owned()))
    }

    /// Runs `command` like [`Guest::run`] and returns what it wrote.
    ///
    /// # Errors
    ///
    /// Those of [`Guest::run`], and [`Error::Command`] where the command fails.
    pub fn check(&mut self, command: &str, deadline: Duration) -> Result<String> {
        match self.run(command, deadline)? {
            (0, output) => Ok(output),
            (status, output) => {
                let status = Status::Code(status).to_string();
                Err(Error::Command { command: command.to_owned(), status, output })
            }
        }
    }

    /// The guest's console.
    pub fn console(&mut self) -> &mut Console {
        &mut self.console
    }
}
