//! Taking a guest: the receiver's half of a local migration, up to its last answer.
//!
//! That answer lets the sender go on. It is given when the guest is to, which is after its memory
//! has been written ([`Held`]).

use std::fs::File;
use std::io;

use tokio::net::UnixListener;

use super::channel::Channel;
use super::protocol::{Follows, ProtocolError, Receiving};
use crate::vmm::api::ApiFault;

/// All of a guest.
#[derive(Debug)]
pub(super) struct Received {
    /// The configuration that goes before its state.
    pub(super) config: Vec<u8>,
    pub(super) state: Vec<u8>,
    /// Its memory, by slots.
    pub(super) memory: Vec<(u32, File)>,
    pub(super) held: Held,
}

/// A sender that waits for its last answer, with its guest stopped.
#[derive(Debug)]
pub(super) struct Held(Channel);

/// What a sender is told at last, so that it keeps its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Release {
    /// That all is well: it was asked to keep its guest, and does so from version 54 on.
    Acknowledged,
    /// That its guest was not taken: any version keeps it then.
    Refused,
}

impl Held {
    /// Lets the sender go on.
    pub(super) async fn let_go(mut self, release: Release) -> io::Result<()> {
        self.0.answer(release == Release::Acknowledged).await
    }
}

/// Waits for a sender and takes its guest.
pub(super) async fn receive(listener: &UnixListener) -> Result<Received, ApiFault> {
    let (stream, _) = listener.accept().await?;
    receive_from(stream.into()).await.map_err(ApiFault::Io)
}

async fn receive_from(mut channel: Channel) -> io::Result<Received> {
    let mut receiving = Receiving::default();
    let (mut config, mut state, mut memory) = (Vec::new(), Vec::new(), Vec::new());
    loop {
        let header = channel.header().await?;
        match receiving.request(header) {
            Ok(Follows::Nothing) => {}
            Ok(Follows::Slot) => memory.push(channel.slot().await?),
            Ok(Follows::Config(length)) => config = channel.bytes(length).await?,
            Ok(Follows::State(length)) => state = channel.bytes(length).await?,
            Ok(Follows::End) => {
                return Ok(Received {
                    config,
                    state,
                    memory,
                    held: Held(channel),
                });
            }
            Err(ProtocolError::Abandoned) => {
                channel.answer(true).await?;
                return Err(ProtocolError::Abandoned.into());
            }
            Err(error) => {
                // It keeps its guest then, as it would if we hung up.
                let _ = channel.answer(false).await;
                return Err(error.into());
            }
        }
        channel.answer(true).await?;
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use tokio::net::UnixStream;

    use super::super::protocol::Command;
    use super::*;

    fn pair() -> (Channel, Channel) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (ours.into(), theirs.into())
    }

    #[tokio::test]
    async fn a_sender_waits_for_its_last_answer() {
        for release in [Release::Acknowledged, Release::Refused] {
            let (mut sender, receiver) = pair();
            let sending = tokio::spawn(async move {
                let file = tempfile::tempfile().unwrap();
                assert!(sender.say(Command::Start, &[]).await.unwrap());
                assert!(sender.say_slot(3, file.as_fd()).await.unwrap());
                assert!(sender.say(Command::Config, b"{}").await.unwrap());
                assert!(sender.say(Command::State, b"[]").await.unwrap());
                sender.say(Command::CompletePaused, &[]).await.unwrap()
            });
            let received = receive_from(receiver).await.unwrap();
            assert_eq!(received.config, b"{}");
            assert_eq!(received.state, b"[]");
            assert_eq!(received.memory[0].0, 3);
            assert!(!sending.is_finished());
            received.held.let_go(release).await.unwrap();
            assert_eq!(sending.await.unwrap(), release == Release::Acknowledged);
        }
    }

    #[tokio::test]
    async fn a_sender_that_is_not_understood_is_told_so() {
        let (mut sender, receiver) = pair();
        let receiving = tokio::spawn(receive_from(receiver));
        assert!(!sender.say(Command::State, b"[]").await.unwrap());
        let error = receiving.await.unwrap().unwrap_err();
        assert_eq!(error.to_string(), "State came first");
    }

    #[tokio::test]
    async fn a_sender_that_ends_in_between_is_an_error() {
        let (mut sender, receiver) = pair();
        let receiving = tokio::spawn(receive_from(receiver));
        assert!(sender.say(Command::Start, &[]).await.unwrap());
        drop(sender);
        assert!(receiving.await.unwrap().is_err());
    }
}
