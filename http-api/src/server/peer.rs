//! Who is at the other end of a connection.

use std::net::IpAddr;

/// How a TCP connection is protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channel {
    /// Not at all.
    Plain,
    /// Encrypted; the client is anybody.
    Encrypted,
    /// Encrypted, and the client has shown a certificate that the listener's authority signed.
    Certified,
}

/// Who is at the other end of a connection; an extension of every request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// Over TCP.
    Tcp {
        /// Its address.
        ip: IpAddr,
        /// How the connection is protected.
        channel: Channel,
    },
    /// Over the Unix socket.
    Unix {
        /// Its user, as the kernel says.
        uid: u32,
    },
}

impl Peer {
    pub(crate) fn ip(&self) -> Option<IpAddr> {
        match self {
            Self::Tcp { ip, .. } => Some(*ip),
            Self::Unix { .. } => None,
        }
    }

    pub(crate) fn scheme(&self) -> &'static str {
        match self {
            Self::Tcp {
                channel: Channel::Encrypted | Channel::Certified,
                ..
            } => "https",
            _ => "http",
        }
    }
}
