//! Responses of one message, in which large values stay where they are: what waits for a slow client is a reference to them.

use super::held::Held;
use crate::model::LARGE_VALUE_BYTES;
use bytes::buf::UninitSlice;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, Response};
use http_body::{Frame, SizeHint};
use prost::Message;
use std::pin::Pin;
use std::task::{Context, Poll};
use tonic::Status;

/// The body of a response.
#[derive(Debug)]
pub(in crate::runtime) enum Body {
    /// One message.
    Reply(Reply),
    /// What tonic makes.
    Other(tonic::body::Body),
}

impl Default for Body {
    fn default() -> Self {
        Body::Other(tonic::body::Body::empty())
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match &mut *self {
            Body::Reply(reply) => Poll::Ready(reply.next().map(Ok)),
            Body::Other(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Body::Reply(reply) => reply.is_over,
            Body::Other(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Body::Reply(_) => SizeHint::default(),
            Body::Other(body) => body.size_hint(),
        }
    }
}

/// What stands before a message: that it is not compressed, and its length.
pub(super) const PREFIX_BYTES: usize = 5;
/// What a response begins with: most are small. It grows as it must.
const BUFFER_BYTES: usize = 128;

/// The response that says `message`. What of it is not a large value is counted in `held` until it is sent.
pub(super) fn of(message: &impl Message, mut held: Held) -> Result<Response<Body>, Status> {
    let length = message.encoded_len();
    let length = u32::try_from(length).map_err(|_| Status::resource_exhausted("the response is over 4 GiB"))?;
    let mut pieces = Pieces::default();
    pieces.flat.reserve(PREFIX_BYTES + BUFFER_BYTES.min(length as usize));
    pieces.flat.put_u8(0);
    pieces.flat.put_u32(length);
    let no_room = |error| Status::internal(format!("the response does not fit: {error}"));
    message.encode(&mut pieces).map_err(no_room)?;
    held.grow(pieces.flat_bytes())?;
    let reply = Reply {
        pieces: pieces.finish(held).into_iter(),
        is_over: false,
    };
    let mut response = Response::new(Body::Reply(reply));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    Ok(response)
}

/// A message as it is written: bytes that are copied, and values that are not.
#[derive(Debug, Default)]
struct Pieces {
    done: Vec<(Bytes, IsFlat)>,
    flat: BytesMut,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct IsFlat(bool);

impl Pieces {
    fn cut(&mut self) {
        if !self.flat.is_empty() {
            self.done.push((self.flat.split().freeze(), IsFlat(true)));
        }
    }

    fn flat_bytes(&self) -> usize {
        let done = self.done.iter().filter(|(_, is_flat)| is_flat.0);
        done.map(|(bytes, _)| bytes.len()).sum::<usize>() + self.flat.len()
    }

    /// All of it, in order. `held` is dropped when the last piece is sent.
    fn finish(mut self, held: Held) -> Vec<Bytes> {
        self.cut();
        let mut pieces: Vec<Bytes> = self.done.into_iter().map(|(bytes, _)| bytes).collect();
        if let Some(last) = pieces.last_mut()
            && held.is_counted()
        {
            let bytes = std::mem::take(last);
            *last = Bytes::from_owner(HeldBytes { bytes, _held: held });
        }
        pieces
    }
}

/// Bytes that are counted as long as they are there.
struct HeldBytes {
    bytes: Bytes,
    _held: Held,
}

impl AsRef<[u8]> for HeldBytes {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

// SAFETY: room and its end are those of `flat`, which is a `BufMut`; `put` leaves it as another call of `put` would find it.
unsafe impl BufMut for Pieces {
    fn remaining_mut(&self) -> usize {
        self.flat.remaining_mut()
    }

    unsafe fn advance_mut(&mut self, count: usize) {
        // SAFETY: the caller vouches for `count` bytes of `chunk_mut`, which are those of `flat`.
        unsafe { self.flat.advance_mut(count) }
    }

    fn chunk_mut(&mut self) -> &mut UninitSlice {
        self.flat.chunk_mut()
    }

    /// prost passes a field of [`Bytes`] as what it is.
    fn put<T: Buf>(&mut self, mut source: T)
    where
        Self: Sized,
    {
        let length = source.remaining();
        if length < LARGE_VALUE_BYTES {
            return self.flat.put(source);
        }
        self.cut();
        self.done.push((source.copy_to_bytes(length), IsFlat(false)));
    }

    fn put_slice(&mut self, source: &[u8]) {
        self.flat.extend_from_slice(source);
    }
}

/// A message, and that all went well.
#[derive(Debug)]
pub(in crate::runtime) struct Reply {
    pieces: std::vec::IntoIter<Bytes>,
    is_over: bool,
}

impl Reply {
    fn next(&mut self) -> Option<Frame<Bytes>> {
        match self.pieces.next() {
            Some(piece) => Some(Frame::data(piece)),
            None if self.is_over => None,
            None => {
                self.is_over = true;
                let ok = HeaderValue::from_static("0");
                Some(Frame::trailers(HeaderMap::from_iter([(Status::GRPC_STATUS, ok)])))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "in a test, the assertion")]

    use super::*;
    use crate::proto::{BatchGetResponse, GetResponse};

    #[test]
    fn large_values_are_not_copied() {
        let sizes = [
            0,
            10,
            LARGE_VALUE_BYTES - 1,
            LARGE_VALUE_BYTES,
            100_000,
            LARGE_VALUE_BYTES,
            5,
        ];
        let results = sizes.map(|size| GetResponse {
            found: true,
            value: vec![size as u8; size].into(),
            version: size as u64,
            ..GetResponse::default()
        });
        let message = BatchGetResponse {
            results: results.to_vec(),
        };
        let mut pieces = Pieces::default();
        message.encode(&mut pieces).unwrap();
        let flat = pieces.flat_bytes();
        pieces.cut();
        let by_reference: Vec<_> = pieces.done.iter().filter(|(_, is_flat)| !is_flat.0).collect();
        let large: Vec<_> = results
            .iter()
            .map(|result| &result.value)
            .filter(|value| value.len() >= 4096)
            .collect();
        assert_eq!(by_reference.len(), large.len());
        for ((piece, _), value) in by_reference.iter().zip(large) {
            assert_eq!(piece.as_ptr(), value.as_ptr());
        }
        let all: Vec<u8> = pieces.done.iter().flat_map(|(bytes, _)| bytes.to_vec()).collect();
        assert_eq!(all, message.encode_to_vec());
        assert_eq!(all.len() - flat, 2 * LARGE_VALUE_BYTES + 100_000);
    }
}
