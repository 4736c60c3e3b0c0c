//! The local migration protocol: what goes over the socket between a Cloud Hypervisor and whoever
//! takes its guest, or gives it one.
//!
//! ```text
//!   request   0 command (2)   2 version, or nothing (6)   8 length of what follows (8)
//!   response  0 status (2)    2 nothing (6)               8 length of what follows (8)
//!
//!   Start ─▶ MemoryFd × n ─▶ Config ─▶ State ─▶ Complete, or CompletePaused
//!             └ a slot (4) with a descriptor        each is answered
//! ```
//!
//! All numbers are little-endian. Nothing here reads or writes: bytes come in, and what is to be
//! read next goes out.
//!
//! Source: `vm-migration/src/protocol.rs` of Cloud Hypervisor 53; version 0 of the protocol, which
//! is that of 52, too.

use thiserror::Error;

/// Header of a request and of a response.
pub const HEADER_BYTES: usize = 16;
/// What follows a `MemoryFd`: the number of a slot.
pub const SLOT_BYTES: usize = 4;
/// What opens a connection for page requests: a role.
pub const FAULTS: [u8; 2] = 2u16.to_le_bytes();
/// Memory slots of one guest; two are usual, one on each side of the hole below 4 GiB.
const MAX_SLOTS: usize = 64;
/// A configuration has a few KiB, a device state some hundreds.
const MAX_CONFIG_BYTES: u64 = 4 << 20;
const MAX_STATE_BYTES: u64 = 64 << 20;

const STATUS_OK: u16 = 1;
const STATUS_ERROR: u16 = 2;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Command {
    /// The first.
    Start = 1,
    /// The machine's configuration.
    Config = 2,
    /// Its devices' state.
    State = 3,
    /// All is there, and the guest runs.
    Complete = 5,
    /// The sender gives up.
    Abandon = 6,
    /// A part of the guest's memory.
    MemoryFd = 7,
    /// All is there, and the guest is stopped.
    CompletePaused = 8,
}

impl Command {
    const fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Start,
            2 => Self::Config,
            3 => Self::State,
            5 => Self::Complete,
            6 => Self::Abandon,
            7 => Self::MemoryFd,
            8 => Self::CompletePaused,
            _ => return None,
        })
    }
}

/// Why a peer can't be understood.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ProtocolError {
    /// A command that isn't there, or not for a guest on the same host.
    #[error("Command {number} is none of a local migration")]
    Command {
        /// Its number.
        number: u16,
    },
    /// A command out of its order.
    #[error("{command:?} came {when}")]
    Order {
        /// Which.
        command: Command,
        /// After what.
        when: &'static str,
    },
    /// Another version of the protocol.
    #[error("The migration protocol has version {found}, and 0 is understood")]
    Version {
        /// Which.
        found: u16,
    },
    /// What follows a command is too long, or too short.
    #[error("{command:?} has {length} bytes")]
    Length {
        /// Which.
        command: Command,
        /// Of how much.
        length: u64,
    },
    /// More memory slots than a guest has.
    #[error("More than {MAX_SLOTS} memory slots")]
    Slots,
    /// The sender gave up.
    #[error("The migration was given up by its sender")]
    Abandoned,
    /// An answer that is none.
    #[error("An answer has status {status} and {length} bytes")]
    Answer {
        /// Its status.
        status: u16,
        /// Bytes that follow.
        length: u64,
    },
}

/// A request's header.
#[must_use]
pub fn request(command: Command, length: u64) -> [u8; HEADER_BYTES] {
    header(command as u16, length)
}

/// An answer to a request.
#[must_use]
pub fn response(is_ok: bool) -> [u8; HEADER_BYTES] {
    header(if is_ok { STATUS_OK } else { STATUS_ERROR }, 0)
}

fn header(first: u16, length: u64) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    bytes[..2].copy_from_slice(&first.to_le_bytes());
    bytes[8..].copy_from_slice(&length.to_le_bytes());
    bytes
}

fn parts(header: [u8; HEADER_BYTES]) -> (u16, u16, u64) {
    let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let [.., a, b, c, d, e, f, g, h] = header;
    (
        half(0),
        half(2),
        u64::from_le_bytes([a, b, c, d, e, f, g, h]),
    )
}

/// Whether an answer says that it was done.
///
/// # Errors
/// It is no answer.
pub fn says_ok(response: [u8; HEADER_BYTES]) -> Result<bool, ProtocolError> {
    match parts(response) {
        (STATUS_OK, _, 0) => Ok(true),
        (STATUS_ERROR, _, 0) => Ok(false),
        (status, _, length) => Err(ProtocolError::Answer { status, length }),
    }
}

/// What is to be read after a request's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Follows {
    /// Nothing; it is to be answered.
    Nothing,
    /// The number of a slot, with a descriptor.
    Slot,
    /// So many bytes of configuration.
    Config(usize),
    /// So many bytes of state.
    State(usize),
    /// Nothing, and this was the last: its answer lets the sender go on.
    End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Connected,
    Started { slots: usize },
    Configured,
    Stated,
    Ended,
}

/// How far a migration has come that is received.
#[derive(Clone, Debug)]
pub struct Receiving {
    stage: Stage,
}

impl Default for Receiving {
    fn default() -> Self {
        Self {
            stage: Stage::Connected,
        }
    }
}

impl Receiving {
    /// A request's header came.
    ///
    /// # Errors
    /// It isn't what a Cloud Hypervisor says now; the connection is of no use any more.
    pub fn request(&mut self, header: [u8; HEADER_BYTES]) -> Result<Follows, ProtocolError> {
        let (number, version, length) = parts(header);
        let command = Command::from_number(number).ok_or(ProtocolError::Command { number })?;
        let (stage, follows) = match (self.stage, command) {
            (_, Command::Abandon) => return Err(ProtocolError::Abandoned),
            (Stage::Connected, Command::Start) if version != 0 => {
                return Err(ProtocolError::Version { found: version });
            }
            (Stage::Connected, Command::Start) => (Stage::Started { slots: 0 }, Follows::Nothing),
            (Stage::Started { slots: MAX_SLOTS }, Command::MemoryFd) => {
                return Err(ProtocolError::Slots);
            }
            (Stage::Started { slots }, Command::MemoryFd) => {
                (Stage::Started { slots: slots + 1 }, Follows::Slot)
            }
            (Stage::Started { slots: 1.. }, Command::Config) => {
                (Stage::Configured, Follows::Config(length as usize))
            }
            (Stage::Configured, Command::State) => (Stage::Stated, Follows::State(length as usize)),
            (Stage::Stated, Command::Complete | Command::CompletePaused) => {
                (Stage::Ended, Follows::End)
            }
            (stage, command) => {
                let when = match stage {
                    Stage::Connected => "first",
                    Stage::Started { slots: 0 } => "before the memory",
                    Stage::Started { .. } => "with the memory",
                    Stage::Configured => "after the configuration",
                    Stage::Stated => "after the state",
                    Stage::Ended => "after the end",
                };
                return Err(ProtocolError::Order { command, when });
            }
        };
        let fits = match follows {
            Follows::Nothing | Follows::End => length == 0,
            Follows::Slot => length == SLOT_BYTES as u64,
            Follows::Config(_) => (1..=MAX_CONFIG_BYTES).contains(&length),
            Follows::State(_) => (1..=MAX_STATE_BYTES).contains(&length),
        };
        if !fits {
            return Err(ProtocolError::Length { command, length });
        }
        self.stage = stage;
        Ok(follows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_migration_goes_from_its_start_to_its_end() {
        let mut receiving = Receiving::default();
        let mut say = |command, length| receiving.request(request(command, length));
        assert_eq!(say(Command::Start, 0), Ok(Follows::Nothing));
        assert_eq!(say(Command::MemoryFd, 4), Ok(Follows::Slot));
        assert_eq!(say(Command::MemoryFd, 4), Ok(Follows::Slot));
        assert_eq!(say(Command::Config, 77), Ok(Follows::Config(77)));
        assert_eq!(say(Command::State, 99), Ok(Follows::State(99)));
        assert_eq!(say(Command::CompletePaused, 0), Ok(Follows::End));
        assert!(say(Command::Start, 0).is_err());
    }

    #[test]
    fn what_comes_out_of_order_is_refused_by_name() {
        let all = [
            Command::Start,
            Command::Config,
            Command::State,
            Command::Complete,
            Command::MemoryFd,
            Command::CompletePaused,
        ];
        let length = |command| match command {
            Command::MemoryFd => 4,
            Command::Config | Command::State => 1,
            _ => 0,
        };
        // What may come when; nothing else may.
        let way = [
            (Command::Start, vec![Command::Start]),
            (Command::MemoryFd, vec![Command::MemoryFd]),
            (Command::Config, vec![Command::MemoryFd, Command::Config]),
            (Command::State, vec![Command::State]),
            (
                Command::Complete,
                vec![Command::Complete, Command::CompletePaused],
            ),
        ];
        let mut receiving = Receiving::default();
        for (next, allowed) in way {
            for command in all {
                let mut trying = receiving.clone();
                let judged = trying.request(request(command, length(command)));
                assert_eq!(judged.is_ok(), allowed.contains(&command), "{command:?}");
            }
            receiving.request(request(next, length(next))).unwrap();
        }
        let mut receiving = Receiving::default();
        let late = receiving.request(request(Command::State, 1)).unwrap_err();
        assert_eq!(late.to_string(), "State came first");
    }

    #[test]
    fn lengths_slots_and_versions_have_bounds() {
        let mut receiving = Receiving::default();
        let mut newer = request(Command::Start, 0);
        newer[2] = 1;
        assert_eq!(
            receiving.request(newer),
            Err(ProtocolError::Version { found: 1 })
        );
        receiving.request(request(Command::Start, 0)).unwrap();
        for _ in 0..MAX_SLOTS {
            receiving.request(request(Command::MemoryFd, 4)).unwrap();
        }
        assert_eq!(
            receiving.request(request(Command::MemoryFd, 4)),
            Err(ProtocolError::Slots)
        );
        for length in [0, MAX_CONFIG_BYTES + 1, u64::MAX] {
            let command = Command::Config;
            assert_eq!(
                receiving.request(request(command, length)),
                Err(ProtocolError::Length { command, length })
            );
        }
        assert!(receiving.request([0xFF; HEADER_BYTES]).is_err());
        assert_eq!(
            receiving.request(request(Command::Abandon, 0)),
            Err(ProtocolError::Abandoned)
        );
    }

    /// Of the commands so far, the ones that a model takes: each by a letter.
    fn model_takes(so_far: &str, next: char) -> bool {
        let stage = match (so_far.chars().last(), so_far) {
            (None, _) => "S",
            (Some('S'), _) => "M",
            (Some('M'), all) if all.len() > MAX_SLOTS => "C",
            (Some('M'), _) => "MC",
            (Some('C'), _) => "T",
            (Some('T'), _) => "EP",
            _ => "",
        };
        stage.contains(next)
    }

    proptest::proptest! {
        #[test]
        fn only_what_a_model_takes_is_accepted(
            says in proptest::collection::vec((0usize..8, 0u64..6, 0u16..8), 0..200),
        ) {
            let known = [
                ('S', Command::Start, 0..=0),
                ('M', Command::MemoryFd, 4..=4),
                ('C', Command::Config, 1..=MAX_CONFIG_BYTES),
                ('T', Command::State, 1..=MAX_STATE_BYTES),
                ('E', Command::Complete, 0..=0),
                ('P', Command::CompletePaused, 0..=0),
            ];
            let (mut receiving, mut so_far) = (Receiving::default(), String::new());
            for (which, length, version) in says {
                // Most of what is said fits, or nothing would come of it.
                let version = version.saturating_sub(6);
                let Some((letter, command, lengths)) = known.get(which) else {
                    let mut unknown = request(Command::Start, length);
                    unknown[1] = which as u8;
                    proptest::prop_assert!(receiving.clone().request(unknown).is_err());
                    continue;
                };
                let length = if version == 0 { length.max(*lengths.start()) } else { length };
                let length = if *lengths.end() == 0 && length < 5 { 0 } else { length };
                let mut header = request(*command, length);
                header[2..4].copy_from_slice(&version.to_le_bytes());
                let mut trying = receiving.clone();
                let takes = model_takes(&so_far, *letter)
                    && lengths.contains(&length)
                    && (*letter != 'S' || version == 0);
                proptest::prop_assert_eq!(trying.request(header).is_ok(), takes, "{} {}", so_far, letter);
                if takes {
                    receiving = trying;
                    so_far.push(*letter);
                }
            }
        }
    }

    #[test]
    fn answers_are_told_apart() {
        assert_eq!(says_ok(response(true)), Ok(true));
        assert_eq!(says_ok(response(false)), Ok(false));
        assert!(says_ok([0; HEADER_BYTES]).is_err());
        assert!(says_ok([1; HEADER_BYTES]).is_err());
    }
}
