//! What a process is and how it is started.

use std::{ffi::OsString, net::SocketAddr};

/// What a process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Computes prompts.
    Prefill,
    /// Generates.
    Decode,
    /// Does both.
    Combined,
    /// Speaks with clients.
    Router,
}

impl Role {
    /// One lower-case word.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Combined => "combined",
            Self::Router => "router",
        }
    }
}

/// How to start a process.
#[derive(Clone, Debug)]
pub(super) struct Spec {
    /// Name for people and for the log file.
    pub(super) name: String,
    /// What it does.
    pub(super) role: Role,
    /// Arguments after the program.
    pub(super) args: Vec<OsString>,
    /// Flag, name among the announced addresses, and address of listeners that must stay where they are over restarts.
    pub(super) pinned: Vec<(&'static str, &'static str, SocketAddr)>,
    /// Variables of its environment beside ours.
    pub(super) env: Vec<(String, OsString)>,
}
