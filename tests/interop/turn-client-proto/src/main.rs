// A TURN client by turn-client-proto, which speaks RFC 8489. It allocates, has a peer send back what
// it sends, by an indication and then by a channel, and deletes; each step is a line of output.
//
// end RELAY PEER USERNAME PASSWORD sha1|sha256 named|hidden

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::process::exit;
use std::time::Duration;

use turn_client_proto::api::{TurnConfig, TurnEvent, TurnPollRet, TurnRecvRet};
use turn_client_proto::prelude::*;
use turn_client_proto::stun::agent::Transmit;
use turn_client_proto::stun::auth::Feature;
use turn_client_proto::stun::types::message::IntegrityAlgorithm;
use turn_client_proto::stun::types::TransportType::Udp;
use turn_client_proto::stun::Instant;
use turn_client_proto::types::TurnCredentials;
use turn_client_proto::udp::TurnClientUdp;

const PATIENCE: Duration = Duration::from_secs(20); // only a failing test waits for so long

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [relay, peer, username, password, integrity, name] = &arguments[..] else {
        eprintln!("usage: end RELAY PEER USERNAME PASSWORD sha1|sha256 named|hidden");
        exit(64);
    };
    let (relay, peer): (SocketAddr, SocketAddr) = (relay.parse().unwrap(), peer.parse().unwrap());
    let mut config = TurnConfig::new(TurnCredentials::new(username, password));
    config.set_supported_integrity(match integrity.as_str() {
        "sha256" => IntegrityAlgorithm::Sha256,
        _ => IntegrityAlgorithm::Sha1,
    });
    config.set_anonymous_username(match name.as_str() {
        "hidden" => Feature::Auto, // the library asks for it where the relay says that it may
        _ => Feature::Disabled,
    });
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.connect(relay).unwrap();
    let local = socket.local_addr().unwrap();
    let client = TurnClientUdp::allocate(local, relay, config);
    let start = std::time::Instant::now();
    let mut end = End { socket, client, local, relay, start, answers: 0 };

    end.step("allocated", |event| matches!(event, TurnEvent::AllocationCreated(..)));
    let now = end.now();
    end.client.create_permission(Udp, peer.ip(), now).unwrap();
    end.step("permitted", |event| matches!(event, TurnEvent::PermissionCreated(..)));
    end.echo(peer, "by an indication");
    let now = end.now();
    end.client.bind_channel(Udp, peer, now).unwrap();
    end.step("bound", |event| matches!(event, TurnEvent::ChannelCreated(..)));
    end.echo(peer, "by a channel");
    let now = end.now();
    end.client.delete(now).unwrap();
    let before = end.answers;
    end.until("deleted", |end| end.answers > before);
}

struct End {
    socket: UdpSocket,
    client: TurnClientUdp,
    local: SocketAddr,
    relay: SocketAddr,
    start: std::time::Instant,
    answers: u32, // that the library took for such
}

impl End {
    fn now(&self) -> Instant {
        Instant::from_std(self.start)
    }

    fn step(&mut self, name: &str, is_done: fn(&TurnEvent) -> bool) {
        self.until(name, |end| {
            while let Some(event) = end.client.poll_event() {
                if is_done(&event) {
                    return true;
                }
                fail(name, &format!("{event:?}"));
            }
            false
        });
    }

    fn until(&mut self, name: &str, mut is_done: impl FnMut(&mut End) -> bool) {
        while !is_done(self) {
            self.turn(name);
        }
        println!("{name}");
    }

    fn echo(&mut self, peer: SocketAddr, text: &str) {
        let now = self.now();
        if let Some(transmit) = self.client.send_to(Udp, peer, text.as_bytes(), now).unwrap() {
            self.socket.send(&transmit.data.build()).unwrap();
        }
        while self.turn(text).as_deref() != Some(text.as_bytes()) {}
        println!("{text}");
    }

    // Does what is due, waits for a datagram, and returns what a peer has sent in it, if anything.
    fn turn(&mut self, name: &str) -> Option<Vec<u8>> {
        if self.start.elapsed() > PATIENCE {
            fail(name, "no answer");
        }
        let now = self.now();
        if let TurnPollRet::Closed = self.client.poll(now) {
            if name != "deleted" {
                fail(name, "the library has given up");
            }
        }
        while let Some(transmit) = self.client.poll_transmit(now) {
            self.socket.send(&transmit.data).unwrap();
        }
        let mut buffer = [0; 2048];
        self.socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let size = match self.socket.recv(&mut buffer) {
            Ok(size) => size,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return None;
            }
            Err(error) => fail(name, &error.to_string()),
        };
        let received = Transmit::new(&buffer[..size], Udp, self.relay, self.local);
        let now = self.now();
        match self.client.recv(received, now) {
            TurnRecvRet::PeerData(data) => return Some(data.data().to_vec()),
            TurnRecvRet::Handled => self.answers += 1,
            other => fail(name, &format!("{other:?}")),
        }
        None
    }
}

fn fail(step: &str, reason: &str) -> ! {
    eprintln!("{step}: {reason}");
    exit(1)
}
