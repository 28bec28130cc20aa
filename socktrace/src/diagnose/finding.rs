//! What a rule says of a listener.

use std::sync::Arc;

use serde::Serialize;
use serde_json::Value;

use super::Case;
use crate::model::Listener;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Connections were lost.
    Critical,
    /// Connections were delayed, or lost something else.
    Warning,
    Info,
}

/// How sure the cause is; what happened was counted by the kernel in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Confidence {
    /// The kernel's own condition was seen.
    Certain,
    /// The numbers fit nothing else that is common.
    Likely,
    /// One of several things that look alike.
    Possible,
}

/// What to change.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Remedy {
    pub text: String,
    /// As root, on this machine.
    pub commands: Vec<String>,
    /// The backlog to pass to `listen()`, where that is the remedy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backlog: Option<u32>,
}

impl Remedy {
    #[must_use]
    pub fn text(text: impl Into<String>) -> Self {
        Self { text: text.into(), ..Self::default() }
    }
}

#[derive(Clone, Debug)]
pub struct Finding {
    pub rule: &'static str,
    /// `None` for trouble that no listener has.
    pub listener: Option<Arc<Listener>>,
    /// The namespace whose listeners it may be about, where that is all that is known.
    pub netns: Option<u32>,
    pub severity: Severity,
    pub confidence: Confidence,
    pub summary: String,
    pub cause: String,
    pub remedy: Remedy,
    /// Numbers of the listener's record, by their place in it.
    pub facts: &'static [&'static str],
    /// What was measured besides.
    pub measured: Vec<(&'static str, Value)>,
}

impl Finding {
    #[must_use]
    pub fn new(rule: &'static str, severity: Severity, confidence: Confidence) -> Self {
        Self {
            rule,
            listener: None,
            netns: None,
            severity,
            confidence,
            summary: String::new(),
            cause: String::new(),
            remedy: Remedy::default(),
            facts: &[],
            measured: Vec::new(),
        }
    }

    #[must_use]
    pub fn of(mut self, case: &Case) -> Self {
        self.listener = Some(Arc::clone(&case.last));
        self
    }

    #[must_use]
    pub fn says(mut self, summary: impl Into<String>, cause: impl Into<String>) -> Self {
        (self.summary, self.cause) = (summary.into(), cause.into());
        self
    }

    #[must_use]
    pub fn advises(mut self, remedy: Remedy) -> Self {
        self.remedy = remedy;
        self
    }

    #[must_use]
    pub fn facts(mut self, facts: &'static [&'static str]) -> Self {
        self.facts = facts;
        self
    }

    #[must_use]
    pub fn measured(mut self, name: &'static str, value: impl Into<Value>) -> Self {
        self.measured.push((name, value.into()));
        self
    }
}
