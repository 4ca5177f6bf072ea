//! Allocates as RFC 8489 has it, by the crate stun-rs: a key by SHA-256, MESSAGE-INTEGRITY-SHA256, and
//! the offered algorithms repeated. Verifies the signature of the answer.
//!
//! modern SERVER USERNAME PASSWORD

use std::env;
use std::error::Error;
use std::net::UdpSocket;
use std::time::Duration;

use stun_rs::attributes::stun::{
    MessageIntegritySha256, Nonce, PasswordAlgorithm, PasswordAlgorithms, Realm, UserName,
};
use stun_rs::attributes::turn::{RequestedTrasport, XorRelayedAddress};
use stun_rs::methods::ALLOCATE;
use stun_rs::protocols::UDP;
use stun_rs::{
    Algorithm, AlgorithmId, DecoderContextBuilder, HMACKey, MessageClass, MessageDecoderBuilder,
    MessageEncoderBuilder, StunMessage, StunMessageBuilder,
};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().collect();
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    socket.connect(&arguments[1])?;
    socket.set_read_timeout(Some(Duration::from_secs(10)))?;

    let first = StunMessageBuilder::new(ALLOCATE, MessageClass::Request)
        .with_attribute(RequestedTrasport::from(UDP))
        .build();
    let challenge = ask(&socket, &first, None)?;
    let nonce = challenge.get::<Nonce>().ok_or("no NONCE")?.expect_nonce();
    let realm = challenge.get::<Realm>().ok_or("no REALM")?.expect_realm();
    let offered = challenge
        .get::<PasswordAlgorithms>()
        .ok_or("no PASSWORD-ALGORITHMS")?
        .expect_password_algorithms();
    if !nonce.is_nonce_cookie() {
        return Err("no nonce cookie".into());
    }

    let username = UserName::new(&arguments[2])?;
    let algorithm = Algorithm::from(AlgorithmId::SHA256);
    let key = HMACKey::new_long_term(&username, realm, &arguments[3], algorithm.clone())?;
    let second = StunMessageBuilder::new(ALLOCATE, MessageClass::Request)
        .with_attribute(RequestedTrasport::from(UDP))
        .with_attribute(username)
        .with_attribute(realm.clone())
        .with_attribute(nonce.clone())
        .with_attribute(offered.clone())
        .with_attribute(PasswordAlgorithm::new(algorithm))
        .with_attribute(MessageIntegritySha256::new(key.clone()))
        .build();
    let answer = ask(&socket, &second, Some(key))?;
    let relayed = answer.get::<XorRelayedAddress>().ok_or("no XOR-RELAYED-ADDRESS")?;
    answer.get::<MessageIntegritySha256>().ok_or("not signed by SHA-256")?;
    println!("{}", relayed.expect_xor_relayed_address().socket_address());
    Ok(())
}

/// Ask, and return the answer; with a key, one that is signed with it.
fn ask(
    socket: &UdpSocket,
    request: &StunMessage,
    key: Option<HMACKey>,
) -> Result<StunMessage, Box<dyn Error>> {
    let mut buffer = [0; 1500];
    let size = MessageEncoderBuilder::default().build().encode(&mut buffer, request)?;
    socket.send(&buffer[..size])?;
    let size = socket.recv(&mut buffer)?;
    let context = match key {
        Some(key) => DecoderContextBuilder::default().with_key(key).with_validation().build(),
        None => DecoderContextBuilder::default().build(),
    };
    let decoder = MessageDecoderBuilder::default().with_context(context).build();
    Ok(decoder.decode(&buffer[..size])?.0)
}
