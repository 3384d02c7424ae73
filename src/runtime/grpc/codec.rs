//! Messages of protobuf, as prost reads and writes them, with a limit to how many fields one has.

use bytes::{Buf, Bytes};
use prost::encoding::{DecodeContext, decode_key, skip_field};
use prost::{DecodeError, Message};
use std::marker::PhantomData;
use tonic::Status;
use tonic::codec::{BufferSettings, DecodeBuf, Decoder, EncodeBuf, Encoder};

/// Fields that a message may have besides the keys of its request.
const OTHER_FIELDS: usize = 16;

/// What a call's buffers begin with: most messages are small. They grow as they must.
const BUFFER_BYTES: usize = 1024;
/// A stream's responses are sent together up to here.
const TOGETHER_BYTES: usize = 32 << 10;

/// Reads messages `Q` and writes messages `R`.
#[derive(Debug)]
pub(super) struct Codec<Q, R> {
    keys_max: usize,
    messages: PhantomData<fn(Q) -> R>,
}

impl<Q, R> Codec<Q, R> {
    /// Of requests with no more than so many keys.
    pub(super) fn new(keys_max: usize) -> Self {
        Self {
            keys_max,
            messages: PhantomData,
        }
    }
}

impl<Q, R> tonic::codec::Codec for Codec<Q, R>
where
    Q: Message + Default + 'static,
    R: Message + 'static,
{
    type Encode = R;
    type Decode = Q;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self::new(self.keys_max)
    }

    fn decoder(&mut self) -> Self {
        Self::new(self.keys_max)
    }
}

impl<Q, R: Message> Encoder for Codec<Q, R> {
    type Item = R;
    type Error = Status;

    fn encode(&mut self, message: R, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        let no_room = |error| Status::internal(format!("the response does not fit: {error}"));
        message.encode(out).map_err(no_room)
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(BUFFER_BYTES, TOGETHER_BYTES)
    }
}

impl<Q: Message + Default, R> Decoder for Codec<Q, R> {
    type Item = Q;
    type Error = Status;

    fn decode(&mut self, input: &mut DecodeBuf<'_>) -> Result<Option<Q>, Status> {
        let bytes = input.copy_to_bytes(input.remaining());
        read(bytes, self.keys_max).map(Some)
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(BUFFER_BYTES, TOGETHER_BYTES)
    }
}

/// Reads a message. An entry without content has two bytes, and is sixty times as large when it is decoded: that there are too
/// many is found out before.
pub(super) fn read<Q: Message + Default>(bytes: Bytes, keys_max: usize) -> Result<Q, Status> {
    // The code that gRPC has for it.
    let malformed = |error: DecodeError| Status::internal(format!("the request is malformed: {error}"));
    let (mut rest, mut fields) = (&*bytes, 0);
    while rest.has_remaining() {
        let (number, wire_type) = decode_key(&mut rest).map_err(malformed)?;
        skip_field(wire_type, number, &mut rest, DecodeContext::default()).map_err(malformed)?;
        fields += 1;
        if fields > keys_max + OTHER_FIELDS {
            return Err(too_many_keys(keys_max));
        }
    }
    Q::decode(bytes).map_err(malformed)
}

/// Refuses a request.
pub(super) fn too_many_keys(keys_max: usize) -> Status {
    Status::resource_exhausted(format!("more than {keys_max} keys in one request"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "in a test, the assertion")]

    use super::*;
    use crate::proto::{BatchPutRequest, Entry};
    use tonic::Code;

    #[test]
    fn fields_are_counted_before_they_are_decoded() {
        let full = BatchPutRequest {
            entries: vec![Entry::default(); 5 + OTHER_FIELDS],
        };
        let bytes = Bytes::from(full.encode_to_vec());
        assert_eq!(read::<BatchPutRequest>(bytes.clone(), 5).unwrap(), full);
        let refusal = read::<BatchPutRequest>(bytes, 4).unwrap_err();
        assert_eq!(refusal.code(), Code::ResourceExhausted);
        assert_eq!(refusal.message(), "more than 4 keys in one request");
    }

    #[test]
    fn a_value_stays_where_it_was_received() {
        let entry = Entry {
            key: b"k".to_vec(),
            value: vec![7; 5000].into(),
            ..Entry::default()
        };
        let bytes = Bytes::from(entry.encode_to_vec());
        let read: Entry = read(bytes.clone(), 1).unwrap();
        assert_eq!(read, entry);
        assert!(bytes.as_ptr_range().contains(&read.value.as_ptr()));
    }

    #[test]
    fn malformed() {
        for bytes in [&b"\x0a\x05k"[..], b"\xff", b"\x00", b"\x0b\x0a", b"\x08\x01"] {
            let refusal = read::<Entry>(Bytes::copy_from_slice(bytes), 1).unwrap_err();
            assert_eq!(refusal.code(), Code::Internal, "{bytes:?}");
        }
    }
}
