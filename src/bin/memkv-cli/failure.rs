//! Why a command came to nothing, and what to tell the user.

use crate::Server;
use crate::screen::plain;
use memkv::client;
use std::io::{self, ErrorKind};

/// Why a command came to nothing.
#[derive(Debug)]
pub(crate) enum Failure {
    /// It was not understood; nothing was sent.
    Unclear(String),
    /// There is no connection.
    Unreachable(io::Error),
    /// The connection ended, or nothing came for too long, before the answer was complete.
    Lost(io::Error),
    /// The server answered what no memcached answers.
    Foreign(Vec<u8>),
    /// The server refused, in these words.
    Refused(Vec<u8>),
    /// The same things, over the protobuf protocol.
    Client(client::Error),
    /// The result could not be shown.
    Output(io::Error),
}

impl From<client::Error> for Failure {
    fn from(error: client::Error) -> Self {
        Failure::Client(error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Failure::Lost(error)
    }
}

impl Failure {
    /// Whether the commands that follow would fare no better.
    pub(crate) fn is_final(&self) -> bool {
        match self {
            Failure::Unreachable(_) | Failure::Output(_) => true,
            Failure::Client(error) => matches!(error, client::Error::Connect { .. } | client::Error::Lookup(_)),
            Failure::Unclear(_) | Failure::Lost(_) | Failure::Foreign(_) | Failure::Refused(_) => false,
        }
    }

    /// What to tell the user, with what can be done about it where something can.
    pub(crate) fn describe(&self, server: &Server) -> String {
        match self {
            Failure::Unclear(text) => text.clone(),
            Failure::Unreachable(error) => format!(
                "cannot connect to {server}: {error}; start memkv-tpc there, or name another address with --server HOST:PORT"
            ),
            Failure::Lost(error) => match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                    format!("{server} did not answer in time; --timeout TIME waits longer")
                }
                ErrorKind::UnexpectedEof => format!("{server} closed the connection before it had answered"),
                _ => format!("the connection to {server} broke before the answer: {error}"),
            },
            Failure::Foreign(answer) => format!(
                "{server} does not speak the memcached protocol: it answered \"{}\"; is it the right port?",
                answer[..answer.len().min(80)].escape_ascii()
            ),
            Failure::Refused(words) if words == b"ERROR" => {
                "the server answered ERROR: it does not know this command".to_owned()
            }
            Failure::Refused(words) => format!("the server answered {}", String::from_utf8_lossy(&plain(words))),
            Failure::Client(error @ client::Error::Connect { .. }) => {
                format!("{error}; start memkv-tpc there, or name another address with --server protobuf://HOST:PORT")
            }
            Failure::Client(error @ (client::Error::Lost { cause, .. } | client::Error::Unknown { cause, .. }))
                if cause.kind() == ErrorKind::TimedOut =>
            {
                format!("{error}; --timeout TIME waits longer, if {server} is the right port")
            }
            Failure::Client(error) => error.to_string(),
            Failure::Output(error) => format!("cannot write the result: {error}"),
        }
    }
}
