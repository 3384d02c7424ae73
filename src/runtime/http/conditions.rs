//! Conditional requests (RFC 9110, section 13): `If-Match` and `If-None-Match`, whose entity tags are versions.

use super::{Problem, Result};
use crate::model::{Condition, Version};
use hyper::StatusCode;
use hyper::header::{self, HeaderMap, HeaderValue};

/// How often a write is tried again whose key was written meanwhile by others.
pub(super) const ATTEMPTS_MAX: usize = 16;

/// A version as an entity tag, without its quotes.
pub(super) fn tag(version: Version) -> String {
    format!("{:016x}", version.0)
}

/// A version as an entity tag.
pub(super) fn etag(version: Version) -> HeaderValue {
    let mut quoted = [b'"'; 18];
    for (place, digit) in quoted[1..17].iter_mut().enumerate() {
        *digit = b"0123456789abcdef"[(version.0 >> (60 - 4 * place)) as usize & 0xf];
    }
    HeaderValue::from_bytes(&quoted).unwrap_or_else(|_| HeaderValue::from_static("\"\""))
}

/// The version that a tag without quotes stands for. Tags that are none of ours match nothing.
pub(super) fn version_of(tag: &str) -> Version {
    match u64::from_str_radix(tag, 16) {
        Ok(number) if tag.len() == 16 => Version(number),
        _ => Version(0),
    }
}

/// That a condition did not hold.
pub(super) fn failed() -> Problem {
    let detail = "the key's item is not as If-Match and If-None-Match demand";
    Problem::new(StatusCode::PRECONDITION_FAILED, detail)
}

/// What one of the two headers names.
#[derive(Debug, PartialEq, Eq)]
enum Named {
    /// The header is not there.
    Nothing,
    /// `*`
    Any,
    Versions(Vec<Version>),
}

/// The conditions of a request.
#[derive(Debug)]
pub(super) struct Conditions {
    matches: Named,
    none_matches: Named,
}

impl Conditions {
    pub(super) fn of(headers: &HeaderMap) -> Result<Self> {
        Ok(Self {
            matches: named(headers, header::IF_MATCH, false)?,
            none_matches: named(headers, header::IF_NONE_MATCH, true)?,
        })
    }

    /// `If-Match` holds of an item of this version, or of none.
    pub(super) fn check_if_match(&self, version: Option<Version>) -> Result<()> {
        let holds = match (&self.matches, version) {
            (Named::Nothing, _) => true,
            (_, None) => false,
            (Named::Any, Some(_)) => true,
            (Named::Versions(versions), Some(version)) => versions.contains(&version),
        };
        if holds { Ok(()) } else { Err(failed()) }
    }

    /// `If-None-Match` holds of an item of this version.
    pub(super) fn is_none_match(&self, version: Version) -> bool {
        match &self.none_matches {
            Named::Nothing => true,
            Named::Any => false,
            Named::Versions(versions) => !versions.contains(&version),
        }
    }

    /// All of it as one condition that a shard can check, if there is one.
    pub(super) fn as_one(&self) -> Option<Condition> {
        match (&self.matches, &self.none_matches) {
            (Named::Nothing, Named::Nothing) => Some(Condition::Always),
            (Named::Nothing, Named::Any) => Some(Condition::Absent),
            (Named::Any, Named::Nothing) => Some(Condition::Present),
            (Named::Versions(versions), Named::Nothing) => match versions.as_slice() {
                [version] => Some(Condition::VersionIs(*version)),
                _ => None,
            },
            _ => None,
        }
    }
}

/// Understands a list of entity tags. `weak`: weak ones match, too.
fn named(headers: &HeaderMap, name: header::HeaderName, weak: bool) -> Result<Named> {
    if !headers.contains_key(&name) {
        return Ok(Named::Nothing);
    }
    let malformed = || Problem::bad(format!("{name} is neither * nor a list of entity tags"));
    let mut versions = vec![];
    let mut any = false;
    for value in headers.get_all(&name) {
        let mut rest = value.to_str().map_err(|_| malformed())?.trim();
        if rest == "*" {
            any = true;
            continue;
        }
        while !rest.is_empty() {
            let is_weak = rest.starts_with("W/");
            let quoted = rest.strip_prefix("W/").unwrap_or(rest);
            let (tag, behind) = quoted
                .strip_prefix('"')
                .and_then(|tag| tag.split_once('"'))
                .filter(|(tag, _)| tag.bytes().all(|byte| byte.is_ascii_graphic()))
                .ok_or_else(malformed)?;
            versions.push(if is_weak && !weak { Version(0) } else { version_of(tag) });
            let behind = behind.trim_start();
            rest = match behind.strip_prefix(',') {
                Some(next) => next.trim_start(),
                None if behind.is_empty() => behind,
                None => return Err(malformed()),
            };
        }
    }
    match any {
        true if versions.is_empty() => Ok(Named::Any),
        false if !versions.is_empty() => Ok(Named::Versions(versions)),
        _ => Err(malformed()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pairs: &[(&'static str, &'static str)]) -> Result<Conditions> {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_static(value));
        }
        Conditions::of(&headers)
    }

    #[test]
    fn lists_of_tags() {
        let none = of(&[]).unwrap();
        assert_eq!(none.as_one(), Some(Condition::Always));
        let version = Version(0xabc);
        assert_eq!(etag(version), "\"0000000000000abc\"");
        assert_eq!(version_of(&tag(version)), version);
        let one = of(&[("if-match", "\"0000000000000abc\"")]).unwrap();
        assert_eq!(one.as_one(), Some(Condition::VersionIs(version)));
        // A weak tag never matches strongly, and a tag of somebody else's never matches.
        let weak = of(&[("if-match", "W/\"0000000000000abc\", \"x\"")]).unwrap();
        assert!(weak.as_one().is_none() && weak.check_if_match(Some(version)).is_err());
        let several = of(&[("if-none-match", "\"a,b\" , W/\"0000000000000abc\""), ("if-match", "*")]).unwrap();
        assert!(several.as_one().is_none() && several.check_if_match(Some(version)).is_ok());
        assert!(several.check_if_match(None).is_err());
        assert!(!several.is_none_match(version) && several.is_none_match(Version(1)));
        assert_eq!(of(&[("if-none-match", "*")]).unwrap().as_one(), Some(Condition::Absent));
        assert_eq!(of(&[("if-match", "*")]).unwrap().as_one(), Some(Condition::Present));
        for bad in ["", "abc", "\"abc", "\"a\" \"b\"", "*, \"a\""] {
            assert!(of(&[("if-match", bad)]).is_err(), "{bad}");
        }
    }
}
