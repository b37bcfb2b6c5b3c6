//! Ports that nobody else takes while their server is down.

use std::net::{Ipv4Addr, TcpListener, UdpSocket};

use crate::Error;

/// Below the range that Linux uses for outgoing connections. One of those could otherwise take the
/// port of a killed server.
const RANGE: std::ops::Range<u16> = 20_000..30_000;

/// A TCP port of 127.0.0.1. It also holds the UDP port of the same number as a token, which keeps
/// other test processes off this number. The token takes no TCP port from anyone, and goes away
/// with this process.
pub(crate) struct Port {
    number: u16,
    _token: UdpSocket,
}

impl Port {
    pub(crate) fn claim() -> Result<Self, Error> {
        for _ in 0..1_000 {
            let number = fastrand::u16(RANGE);
            if let Ok(token) = UdpSocket::bind((Ipv4Addr::LOCALHOST, number))
                && TcpListener::bind((Ipv4Addr::LOCALHOST, number)).is_ok()
            {
                return Ok(Self { number, _token: token });
            }
        }
        Err(format!(
            "no free port of 127.0.0.1 between {} and {}",
            RANGE.start,
            RANGE.end - 1
        )
        .into())
    }

    pub(crate) fn number(&self) -> u16 {
        self.number
    }
}
