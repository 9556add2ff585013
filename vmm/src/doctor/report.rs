//! What the examination found, for people and for programs.

use std::fmt;

use serde::Serialize;
use serde::ser::{SerializeStruct, Serializer};

/// How much a "no" matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Without it no guest runs.
    Required,
    /// Guests run without it; something is slower, or one feature is missing.
    Optional,
}

/// How guests' kernel code (ring 0) is executed on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Virtualization {
    /// By the processor.
    Hardware,
    /// By an emulator in the host's kernel, a thousand times slower and not every instruction; ring 3 runs natively.
    Interpreted,
    /// Not at all.
    None,
}

/// One thing looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Stable short name, for programs: lower case, words joined by `-`.
    pub name: &'static str,
    /// Whether the host has it.
    pub ok: bool,
    /// How much it matters.
    pub severity: Severity,
    /// What was found, in one line.
    pub found: String,
    /// What to do about a "no", in one line.
    pub advice: Option<String>,
}

impl Check {
    /// The host has it.
    pub(super) fn yes(name: &'static str, severity: Severity, found: impl Into<String>) -> Self {
        Self { name, ok: true, severity, found: found.into(), advice: None }
    }

    /// The host has it not.
    pub(super) fn no(
        name: &'static str,
        severity: Severity,
        found: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self { name, ok: false, severity, found: found.into(), advice: Some(advice.into()) }
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = match (self.ok, self.severity) {
            (true, _) => "yes",
            (false, Severity::Optional) => "no",
            (false, Severity::Required) => "NO",
        };
        write!(f, "{mark:<4} {:<16} {}", self.name, self.found)?;
        match &self.advice {
            Some(advice) => write!(f, " — {advice}"),
            None => Ok(()),
        }
    }
}

/// All that was looked at.
///
/// Its `Display` is one line per check and a last line that sums up, without the last line's end. As JSON:
/// `{"checks":[{"name":"kvm","ok":true,"severity":"required","found":"…","advice":null},…],`
/// `"virtualization":"hardware"|"interpreted"|"none","can_run_guests":true|false}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    checks: Vec<Check>,
    virtualization: Virtualization,
}

impl Report {
    pub(super) fn new(checks: Vec<Check>, virtualization: Virtualization) -> Self {
        Self { checks, virtualization }
    }

    /// The checks in the order in which they are shown.
    #[must_use]
    pub fn checks(&self) -> &[Check] {
        &self.checks
    }

    /// How guests' kernel code is executed here.
    #[must_use]
    pub fn virtualization(&self) -> Virtualization {
        self.virtualization
    }

    /// Whether a guest can be started here: nothing that is required is missing.
    ///
    /// True also where ring 0 is [interpreted](Virtualization::Interpreted), though few kernels get far there.
    #[must_use]
    pub fn can_run_guests(&self) -> bool {
        self.virtualization != Virtualization::None && self.missing().next().is_none()
    }

    fn missing(&self) -> impl Iterator<Item = &'static str> + '_ {
        self.checks
            .iter()
            .filter(|check| !check.ok && check.severity == Severity::Required)
            .map(|check| check.name)
    }

    fn summary(&self) -> String {
        if !self.can_run_guests() {
            let missing: Vec<_> = self.missing().collect();
            return format!("Guests cannot run here for want of: {}.", missing.join(", "));
        }
        match self.virtualization {
            Virtualization::Interpreted => {
                "Guests can run here if their kernel code is short and simple; stock kernels do not get far."
            }
            _ => "Guests can run here.",
        }
        .to_owned()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for check in &self.checks {
            writeln!(f, "{check}")?;
        }
        f.write_str(&self.summary())
    }
}

impl Serialize for Report {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut object = serializer.serialize_struct("Report", 3)?;
        object.serialize_field("checks", &self.checks)?;
        object.serialize_field("virtualization", &self.virtualization)?;
        object.serialize_field("can_run_guests", &self.can_run_guests())?;
        object.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Severity::{Optional, Required};

    fn report(checks: Vec<Check>) -> Report {
        Report::new(checks, Virtualization::Hardware)
    }

    #[test]
    fn lines_show_mark_name_finding_and_advice() {
        let text = report(vec![
            Check::yes("kvm", Required, "/dev/kvm, API 12"),
            Check::no("hugepages", Optional, "none reserved", "sysctl vm.nr_hugepages=512"),
        ])
        .to_string();
        assert_eq!(
            text,
            "yes  kvm              /dev/kvm, API 12\n\
             no   hugepages        none reserved — sysctl vm.nr_hugepages=512\n\
             Guests can run here."
        );
    }

    #[test]
    fn missing_optional_thing_leaves_guests_able_to_run() {
        assert!(report(vec![Check::no("ksm", Optional, "off", "on")]).can_run_guests());
    }

    #[test]
    fn missing_required_thing_is_named_in_the_last_line() {
        let report =
            report(vec![Check::no("kvm", Required, "absent", "do"), Check::no("ksm", Optional, "off", "on")]);
        assert!(!report.can_run_guests());
        assert!(report.to_string().ends_with("Guests cannot run here for want of: kvm."), "{report}");
        assert!(report.to_string().starts_with("NO   kvm "), "{report}");
    }

    #[test]
    fn json_has_the_documented_shape() {
        let report = Report::new(
            vec![
                Check::yes("kvm", Required, "/dev/kvm"),
                Check::no("ksm", Optional, "off", "echo 1 > /sys/kernel/mm/ksm/run"),
            ],
            Virtualization::Interpreted,
        );
        assert_eq!(
            serde_json::to_value(&report).unwrap(),
            serde_json::json!({
                "checks": [
                    {"name": "kvm", "ok": true, "severity": "required", "found": "/dev/kvm", "advice": null},
                    {"name": "ksm", "ok": false, "severity": "optional", "found": "off",
                     "advice": "echo 1 > /sys/kernel/mm/ksm/run"},
                ],
                "virtualization": "interpreted",
                "can_run_guests": true,
            })
        );
    }
}
