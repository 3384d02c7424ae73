//! Replies that come in any order: the session of the connection tells which request each belongs to.

use super::{Connection, OutOfStep, Worker};
use crate::protocol::{Event, Parsed, Protocol, Session};
use crate::stats::ErrorKind;

impl<P: Protocol> Worker<'_, P> {
    /// Reads the frames in `data`; how many bytes they take.
    pub(super) fn consume_frames(
        &mut self,
        connection: &mut Connection<P>,
        data: &[u8],
        now: u64,
    ) -> Result<usize, OutOfStep> {
        let mut used = 0;
        loop {
            let rest = &data[used..];
            let (event, len) = match connection.session.read(rest, &mut connection.out) {
                Parsed::Done(event, len) => (event, len),
                Parsed::Incomplete => break,
                Parsed::Malformed => {
                    self.tally.error(ErrorKind::Malformed, 1, &rest[..rest.len().min(40)]);
                    return Err(OutOfStep);
                }
            };
            used += len;
            match event {
                Event::Nothing => {}
                Event::Answered(place) => self.answered(connection, place, now),
                Event::Closing => {
                    let why = connection.session.closing().to_owned();
                    self.lost(connection, ErrorKind::Closed, &why);
                    // Nothing that follows is of use.
                    used = data.len();
                    break;
                }
            }
        }
        self.end_batch(used, now);
        Ok(used)
    }

    /// The request at this place of the ring was answered.
    #[inline(always)]
    fn answered(&mut self, connection: &mut Connection<P>, place: usize, now: u64) {
        let flight = connection.flights[place];
        let (command, key) = (flight.tag.command(), flight.tag.key());
        let good = match connection.session.answer(place) {
            Ok(message) => match P::reply(command, self.population.key_len(key), message) {
                Parsed::Done(reply, len) if len == message.len() => self.check(key, reply),
                // The connection is in step whatever the message says.
                _ => {
                    self.tally
                        .error(ErrorKind::Malformed, 1, &message[..message.len().min(40)]);
                    false
                }
            },
            Err(words) => {
                self.tally.error(ErrorKind::Refused, 1, words);
                false
            }
        };
        connection.release(place);
        self.replies += 1;
        if good {
            self.good(connection, flight, now);
        }
    }
}

impl<P: Protocol> Connection<P> {
    /// Frees a place anywhere in the ring: the request at the front moves there.
    #[inline(always)]
    fn release(&mut self, place: usize) {
        if place != self.head {
            self.flights.swap(place, self.head);
            self.session.swap(place, self.head);
        }
        self.pop();
    }
}
