//! What a command did to a shard, as bytes: the one vocabulary of the log and of snapshots.
//!
//! An effect is a final value, not a request: applied twice, it is as if it had been applied once. The bytes stay on disk from one
//! version to the next, so the layout below is also in `docs/format.md` and never changes without a new format version. All
//! numbers are little-endian; nothing is aligned.
//!
//! ```text
//! put     0 kind 1   1 has u8   2 key length u16   4 value length u32   8 [flags u32] [deadline u64] [state u8] key value
//! delete  0 kind 2   1 0        2 key length u16   4 key
//! amend   0 kind 3   1 has u8   2 key length u16   4 [deadline u64] [state u8] key
//! empty   0 kind 4   1 0
//! part    0 kind 5   1 0        2 core u16   4 clock u64   12 epoch u64   20 writers u16   22 length u32   26 writers' cores u16 each, effects
//! has     1 flags   2 deadline   4 state
//! ```

use crate::model::{Deadline, UnixMillis};

/// The longest key that can be written.
pub const KEY_BYTES_MAX: usize = u16::MAX as usize;

const PUT: u8 = 1;
const DELETE: u8 = 2;
const AMEND: u8 = 3;
const EMPTY: u8 = 4;
const PART: u8 = 5;

const HAS_FLAGS: u8 = 1;
const HAS_DEADLINE: u8 = 2;
const HAS_STATE: u8 = 4;

/// An item as it was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Image<'a> {
    /// Its key.
    pub key: &'a [u8],
    /// Its value.
    pub value: &'a [u8],
    /// The client's own flags.
    pub flags: u32,
    /// When it ends.
    pub deadline: Deadline,
    /// Whether it is stale, and how its key was given: bits of the store's.
    pub state: u8,
}

/// A part of a transaction that several cores write to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part<'a> {
    /// The coordinator's core, which with the clock names the transaction.
    pub core: u16,
    /// The coordinator's clock.
    pub clock: u64,
    /// The epoch in which it was decided.
    pub epoch: u64,
    /// The cores that write, as they are in the file: two bytes each.
    writers: &'a [u8],
    /// What this core wrote.
    pub effects: &'a [u8],
}

impl<'a> Part<'a> {
    /// The cores that write.
    pub fn writers(&self) -> impl Iterator<Item = u16> + 'a {
        let cores = self.writers.chunks_exact(2);
        cores.map(|core| u16::from_le_bytes([core[0], core[1]]))
    }
}

/// What is done to a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect<'a> {
    /// This item takes the place of what its key had.
    Put(Image<'a>),
    /// The key has nothing any more.
    Delete(&'a [u8]),
    /// The item of this key has another deadline and state.
    Amend {
        /// Its key.
        key: &'a [u8],
        /// When it ends now.
        deadline: Deadline,
        /// Its state now.
        state: u8,
    },
    /// All shards of the core are empty.
    Empty,
    /// A transaction's part.
    Part(Part<'a>),
}

/// The bytes are no effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

fn push_head(out: &mut Vec<u8>, kind: u8, has: u8, key: &[u8]) {
    out.extend_from_slice(&[kind, has]);
    out.extend_from_slice(&(key.len() as u16).to_le_bytes());
}

fn push_tail(out: &mut Vec<u8>, deadline: Deadline, state: u8) {
    if let Deadline::At(moment) = deadline {
        out.extend_from_slice(&moment.0.to_le_bytes());
    }
    if state != 0 {
        out.push(state);
    }
}

fn has(flags: u32, deadline: Deadline, state: u8) -> u8 {
    let flags = if flags == 0 { 0 } else { HAS_FLAGS };
    let deadline = if deadline == Deadline::Never { 0 } else { HAS_DEADLINE };
    let state = if state == 0 { 0 } else { HAS_STATE };
    flags | deadline | state
}

/// Appends [`Effect::Put`].
#[inline]
pub fn push_put(out: &mut Vec<u8>, image: &Image<'_>) {
    let Image {
        key,
        value,
        flags,
        deadline,
        state,
    } = *image;
    out.reserve(8 + 13 + key.len() + value.len());
    push_head(out, PUT, has(flags, deadline, state), key);
    out.extend_from_slice(&(value.len() as u32).to_le_bytes());
    if flags != 0 {
        out.extend_from_slice(&flags.to_le_bytes());
    }
    push_tail(out, deadline, state);
    out.extend_from_slice(key);
    out.extend_from_slice(value);
}

/// Appends [`Effect::Delete`].
pub fn push_delete(out: &mut Vec<u8>, key: &[u8]) {
    push_head(out, DELETE, 0, key);
    out.extend_from_slice(key);
}

/// Appends [`Effect::Amend`].
pub fn push_amend(out: &mut Vec<u8>, key: &[u8], deadline: Deadline, state: u8) {
    push_head(out, AMEND, has(0, deadline, state), key);
    push_tail(out, deadline, state);
    out.extend_from_slice(key);
}

/// Appends [`Effect::Empty`].
pub fn push_empty(out: &mut Vec<u8>) {
    out.extend_from_slice(&[EMPTY, 0]);
}

/// Begins [`Effect::Part`]: effects follow, then [`finish_part`] with what this returns.
pub fn begin_part(out: &mut Vec<u8>, core: u16, clock: u64, epoch: u64, writers: &[u16]) -> usize {
    out.extend_from_slice(&[PART, 0]);
    out.extend_from_slice(&core.to_le_bytes());
    out.extend_from_slice(&clock.to_le_bytes());
    out.extend_from_slice(&epoch.to_le_bytes());
    out.extend_from_slice(&(writers.len() as u16).to_le_bytes());
    let length_at = out.len();
    out.extend_from_slice(&[0; 4]);
    writers
        .iter()
        .for_each(|core| out.extend_from_slice(&core.to_le_bytes()));
    length_at
}

/// Ends the part that [`begin_part`] began.
pub fn finish_part(out: &mut [u8], length_at: usize) {
    let writers = u16::from_le_bytes([out[length_at - 2], out[length_at - 1]]);
    let length = (out.len() - length_at - 4 - 2 * usize::from(writers)) as u32;
    out[length_at..length_at + 4].copy_from_slice(&length.to_le_bytes());
}

/// Takes bytes off the front, if there are so many.
fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Result<&'a [u8], Malformed> {
    let (taken, rest) = bytes.split_at_checked(count).ok_or(Malformed)?;
    *bytes = rest;
    Ok(taken)
}

fn take_number<const N: usize>(bytes: &mut &[u8]) -> Result<[u8; N], Malformed> {
    let (taken, rest) = bytes.split_first_chunk::<N>().ok_or(Malformed)?;
    *bytes = rest;
    Ok(*taken)
}

fn take_tail(bytes: &mut &[u8], has: u8) -> Result<(Deadline, u8), Malformed> {
    let deadline = match has & HAS_DEADLINE {
        0 => Deadline::Never,
        _ => Deadline::At(UnixMillis(u64::from_le_bytes(take_number(bytes)?))),
    };
    let state = match has & HAS_STATE {
        0 => 0,
        _ => take_number::<1>(bytes)?[0],
    };
    Ok((deadline, state))
}

/// Takes the next effect off the front.
pub fn read<'a>(bytes: &mut &'a [u8]) -> Result<Effect<'a>, Malformed> {
    let [kind, has] = take_number(bytes)?;
    if has & !(HAS_FLAGS | HAS_DEADLINE | HAS_STATE) != 0 {
        return Err(Malformed);
    }
    match kind {
        PUT => {
            let key_len = usize::from(u16::from_le_bytes(take_number(bytes)?));
            let value_len = u32::from_le_bytes(take_number(bytes)?) as usize;
            let flags = match has & HAS_FLAGS {
                0 => 0,
                _ => u32::from_le_bytes(take_number(bytes)?),
            };
            let (deadline, state) = take_tail(bytes, has)?;
            let (key, value) = (take(bytes, key_len)?, take(bytes, value_len)?);
            Ok(Effect::Put(Image {
                key,
                value,
                flags,
                deadline,
                state,
            }))
        }
        DELETE | AMEND if has & HAS_FLAGS == 0 => {
            let key_len = usize::from(u16::from_le_bytes(take_number(bytes)?));
            let (deadline, state) = take_tail(bytes, has)?;
            let key = take(bytes, key_len)?;
            match kind {
                DELETE if has != 0 => Err(Malformed),
                DELETE => Ok(Effect::Delete(key)),
                _ => Ok(Effect::Amend { key, deadline, state }),
            }
        }
        EMPTY if has == 0 => Ok(Effect::Empty),
        PART if has == 0 => {
            let core = u16::from_le_bytes(take_number(bytes)?);
            let clock = u64::from_le_bytes(take_number(bytes)?);
            let epoch = u64::from_le_bytes(take_number(bytes)?);
            let writers = usize::from(u16::from_le_bytes(take_number(bytes)?));
            let length = u32::from_le_bytes(take_number(bytes)?) as usize;
            let (writers, effects) = (take(bytes, 2 * writers)?, take(bytes, length)?);
            Ok(Effect::Part(Part {
                core,
                clock,
                epoch,
                writers,
                effects,
            }))
        }
        _ => Err(Malformed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn deadline() -> impl Strategy<Value = Deadline> {
        prop_oneof![
            Just(Deadline::Never),
            any::<u64>().prop_map(|moment| Deadline::At(UnixMillis(moment)))
        ]
    }

    proptest! {
        /// What is written is what is read, and nothing is left; every shorter piece is malformed.
        #[test]
        fn effects_come_back(
            key in prop::collection::vec(any::<u8>(), 0..300),
            value in prop::collection::vec(any::<u8>(), 0..300),
            flags: u32, deadline in deadline(), state: u8, writers in prop::collection::vec(any::<u16>(), 0..5),
        ) {
            let image = Image { key: &key, value: &value, flags, deadline, state };
            let mut bytes = vec![];
            push_put(&mut bytes, &image);
            push_delete(&mut bytes, &key);
            push_amend(&mut bytes, &key, deadline, state);
            push_empty(&mut bytes);
            let inside = bytes.clone();
            let part = begin_part(&mut bytes, 3, 4, 5, &writers);
            bytes.extend_from_slice(&inside);
            finish_part(&mut bytes, part);
            let mut rest = &bytes[..];
            prop_assert_eq!(read(&mut rest), Ok(Effect::Put(image)));
            prop_assert_eq!(read(&mut rest), Ok(Effect::Delete(&key)));
            prop_assert_eq!(read(&mut rest), Ok(Effect::Amend { key: &key, deadline, state }));
            prop_assert_eq!(read(&mut rest), Ok(Effect::Empty));
            let whole = rest;
            let Ok(Effect::Part(part)) = read(&mut rest) else { panic!("no part") };
            prop_assert_eq!((part.core, part.clock, part.epoch, part.effects), (3, 4, 5, &inside[..]));
            prop_assert_eq!(part.writers().collect::<Vec<_>>(), writers);
            prop_assert!(rest.is_empty());
            for end in 0..whole.len() {
                prop_assert_eq!(read(&mut &whole[..end]), Err(Malformed));
            }
        }

        /// Whatever the bytes are, reading them ends.
        #[test]
        fn any_bytes_are_read(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut rest = &bytes[..];
            while read(&mut rest).is_ok() {
                if rest.is_empty() { break; }
            }
        }
    }
}
