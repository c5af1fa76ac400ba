//! MAC addresses of Ethernet interfaces.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A MAC address (EUI-48). Displayed as `02:00:00:00:00:01`. Parsed from that form, in either case,
/// and with hyphens instead of colons.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddr([u8; 6]);

impl MacAddr {
    /// Creates an address from its bytes in the order in which Ethernet sends them.
    pub const fn new(octets: [u8; 6]) -> Self {
        Self(octets)
    }

    /// Returns the bytes in the order in which Ethernet sends them.
    pub const fn octets(self) -> [u8; 6] {
        self.0
    }

    /// Returns true for addresses of groups, which include the broadcast address.
    pub const fn is_multicast(self) -> bool {
        self.0[0] & 1 == 1
    }

    /// Returns true for 00:00:00:00:00:00.
    pub const fn is_zero(self) -> bool {
        matches!(self.0, [0, 0, 0, 0, 0, 0])
    }

    /// Returns true if an interface can have this address: it is neither multicast nor zero.
    pub const fn is_assignable(self) -> bool {
        !self.is_multicast() && !self.is_zero()
    }
}

impl From<[u8; 6]> for MacAddr {
    fn from(octets: [u8; 6]) -> Self {
        Self(octets)
    }
}

impl From<MacAddr> for [u8; 6] {
    fn from(address: MacAddr) -> Self {
        address.0
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is not six bytes of two hexadecimal digits each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a MAC address is six bytes in hexadecimal, such as 02:00:00:00:00:01")]
pub struct BadMacAddr;

impl FromStr for MacAddr {
    type Err = BadMacAddr;

    fn from_str(text: &str) -> Result<Self, BadMacAddr> {
        let mut octets = [0; 6];
        let mut parts = text.split([':', '-']);
        for octet in &mut octets {
            let part = parts.next().ok_or(BadMacAddr)?;
            // `from_str_radix` would also accept a sign.
            if part.len() != 2 || !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(BadMacAddr);
            }
            *octet = u8::from_str_radix(part, 16).map_err(|_| BadMacAddr)?;
        }
        if parts.next().is_some() { Err(BadMacAddr) } else { Ok(Self(octets)) }
    }
}

/// Text in readable formats such as JSON, six bytes in others.
impl Serialize for MacAddr {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.collect_str(self)
        } else {
            self.0.serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for MacAddr {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
        } else {
            <[u8; 6]>::deserialize(deserializer).map(Self)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_parsed_and_displayed() {
        let address = MacAddr::new([2, 0, 0xab, 0, 0, 1]);
        assert_eq!(address.to_string(), "02:00:ab:00:00:01");
        for text in ["02:00:ab:00:00:01", "02:00:AB:00:00:01", "02-00-ab-00-00-01"] {
            assert_eq!(text.parse(), Ok(address), "{text}");
        }
        for bad in [
            "",
            "02",
            "02:00:00:00:00",
            "02:00:00:00:00:00:00",
            "02:0:0:0:0:0",
            "+2:00:00:00:00:00",
            "02:00:00:00:00:0g",
            "02:00:00:00:00:é",
            "020000000001",
        ] {
            assert_eq!(bad.parse::<MacAddr>(), Err(BadMacAddr), "{bad}");
        }
    }

    #[test]
    fn only_unicast_addresses_other_than_zero_are_assignable() {
        assert!(MacAddr::new([2, 0, 0, 0, 0, 1]).is_assignable());
        assert!(!MacAddr::new([0; 6]).is_assignable());
        assert!(!MacAddr::new([0xff; 6]).is_assignable());
        assert!(MacAddr::new([1, 0, 0x5e, 0, 0, 1]).is_multicast());
        assert!(!MacAddr::new([0; 6]).is_multicast());
    }
}
