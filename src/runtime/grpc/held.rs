//! What requests and responses on their way take of a core's memory, and how much they may.
//!
//! A client may open many streams and send each as slowly as it likes; tonic collects each until its message is whole. And it may
//! ask for much and take none of it.

use crate::model::LARGE_VALUE_BYTES;
use crate::runtime::calls::Calls;
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use std::cell::Cell;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tonic::Status;

/// Together they may take as much as this many of the longest requests: one that is slow does not keep the others out.
const LONGEST_REQUESTS: usize = 4;

/// Not counted of each: small ones are served however much memory the large ones take. It is little beside what their stream takes,
/// and how many of those a connection may have is limited.
const FREE_BYTES: usize = LARGE_VALUE_BYTES;

thread_local! {
    /// Bytes that are counted on this core.
    static COUNTED_BYTES: Cell<usize> = const { Cell::new(0) };
}

/// What one of them takes. Must be dropped on the core where it was made: connections do not move.
#[derive(Debug)]
pub(super) struct Held {
    bytes: usize,
    /// Of all on the core.
    bytes_max: usize,
}

impl Held {
    /// Nothing yet.
    pub(super) fn new(calls: &Calls) -> Self {
        Self::within(LONGEST_REQUESTS * calls.config().limits.request_bytes_max() as usize)
    }

    fn within(bytes_max: usize) -> Self {
        Self { bytes: 0, bytes_max }
    }

    /// Others have less because of it.
    pub(super) fn is_counted(&self) -> bool {
        self.counted() > 0
    }

    fn counted(&self) -> usize {
        self.bytes.saturating_sub(FREE_BYTES)
    }

    /// Takes more, or says that there is no more to take.
    pub(super) fn grow(&mut self, bytes: usize) -> Result<(), Status> {
        let before = self.counted();
        self.bytes += bytes;
        let more = self.counted() - before;
        let all = COUNTED_BYTES.get() + more;
        COUNTED_BYTES.set(all);
        if more > 0 && all > self.bytes_max {
            let reason = "calls that are under way take all memory that there is for them: try again";
            return Err(Status::resource_exhausted(reason));
        }
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        COUNTED_BYTES.set(COUNTED_BYTES.get() - self.counted());
    }
}

/// The body of a request, counted as it comes.
#[derive(Debug)]
pub(super) struct Counted {
    body: Incoming,
    held: Held,
    unread: Option<Frame<Bytes>>,
}

impl Counted {
    pub(super) fn new(body: Incoming, held: Held) -> Self {
        let unread = None;
        Self { body, held, unread }
    }

    /// Has a frame, which was the last to come, come again.
    pub(super) fn unread(&mut self, frame: Frame<Bytes>) {
        self.unread = Some(frame);
    }
}

impl Body for Counted {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(frame) = self.unread.take() {
            return Poll::Ready(Some(Ok(frame)));
        }
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        Poll::Ready(frame.map(|frame| {
            let frame = frame.map_err(|error| Status::from_error(error.into()))?;
            let bytes = frame.data_ref().map_or(0, Bytes::len);
            self.held.grow(bytes)?;
            Ok(frame)
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.unread.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "in a test, the assertion")]

    use super::*;

    #[test]
    fn what_is_dropped_is_taken_again() {
        let mut one = Held::within(10_000);
        one.grow(FREE_BYTES).unwrap();
        assert_eq!(COUNTED_BYTES.get(), 0);
        one.grow(9_000).unwrap();
        let mut other = Held::within(10_000);
        other.grow(FREE_BYTES).unwrap();
        other.grow(1_000).unwrap();
        let refusal = other.grow(1).unwrap_err();
        assert_eq!(refusal.code(), tonic::Code::ResourceExhausted);
        let mut small = Held::within(10_000);
        small.grow(FREE_BYTES).unwrap();
        drop(other);
        assert_eq!(COUNTED_BYTES.get(), 9_000);
        one.grow(1_000).unwrap();
        drop(one);
        drop(small);
        assert_eq!(COUNTED_BYTES.get(), 0);
    }
}
