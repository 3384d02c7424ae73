//! Header blocks: those of requests, which are always the same few fields, and what those of responses say.

use super::Command;
use loona_hpack::Decoder;

/// Fields of every request, which the server's table gets in this order with the first one, behind its path.
const COMMON: [(&[u8], &[u8]); 3] = [
    (b":authority", b"localhost"),
    (b"te", b"trailers"),
    (b"content-type", b"application/grpc"),
];

/// Indexes of the static table.
const METHOD_POST: u8 = 3;
const SCHEME_HTTP: u8 = 6;
/// The first index of the dynamic table, that of its latest entry.
const DYNAMIC: u8 = 62;
/// A field that is in a table.
const INDEXED: u8 = 0x80;
/// A field that is written out, with a new name, to be kept in the table.
const KEPT: u8 = 0x40;
/// The same, not to be kept.
const NOT_KEPT: u8 = 0x00;
/// The table is to have no room any more.
const TABLE_OF_NOTHING: u8 = 0x20;

/// Bytes of the header block of a request all of whose fields are in the server's table.
pub(super) const INDEXED_BLOCK: usize = 3 + COMMON.len();

/// The table that a server has unless it says something else. What is kept here needs a tenth of it.
const TABLE_SIZE: u32 = 4096;

/// The path of a command's method.
fn path(command: Command) -> &'static [u8] {
    match command {
        Command::Get => b"/memkv.KV/Get",
        Command::Set => b"/memkv.KV/Put",
        _ => b"/memkv.KV/Delete",
    }
}

/// Writes header blocks of requests. As other clients do, it has the server keep each field from the first request with
/// it on, and from then on sends a byte for it: what is measured must not be a server that reads the same words each time.
#[derive(Debug)]
pub(super) struct Requests {
    /// By [`Command`]: the block of a request all of whose fields are in the server's table.
    indexed: [Option<[u8; INDEXED_BLOCK]>; Command::ALL.len()],
    /// Commands whose paths are in the server's table, in the order of their coming there.
    known: Vec<Command>,
    /// Whether the server's table has room for everything.
    room: bool,
    /// The server wants to hear that its table is smaller now.
    shrinking: bool,
}

impl Requests {
    pub(super) fn new() -> Self {
        Requests {
            indexed: Default::default(),
            known: Vec::new(),
            room: true,
            shrinking: false,
        }
    }

    /// The server's table has room for so many bytes.
    pub(super) fn table_size(&mut self, size: u32) {
        if size < TABLE_SIZE && self.room {
            // A server that has little room gets everything written out.
            self.room = false;
            self.shrinking = true;
            self.known.clear();
            self.indexed = Default::default();
        }
    }

    /// The block for a request with this command, if the server's table has all of it.
    #[inline(always)]
    pub(super) fn indexed(&self, command: Command) -> Option<&[u8; INDEXED_BLOCK]> {
        self.indexed[command as usize].as_ref()
    }

    /// Appends the block for a request with this command.
    pub(super) fn append(&mut self, command: Command, out: &mut Vec<u8>) {
        if let Some(block) = self.indexed(command) {
            return out.extend_from_slice(block);
        }
        if std::mem::take(&mut self.shrinking) {
            out.push(TABLE_OF_NOTHING);
        }
        out.extend_from_slice(&[INDEXED | METHOD_POST, INDEXED | SCHEME_HTTP]);
        if !self.room {
            literal(out, NOT_KEPT, b":path", path(command));
            return COMMON
                .iter()
                .for_each(|(name, value)| literal(out, NOT_KEPT, name, value));
        }
        let first = self.known.is_empty();
        literal(out, KEPT, b":path", path(command));
        self.known.push(command);
        match first {
            true => COMMON.iter().for_each(|(name, value)| literal(out, KEPT, name, value)),
            false => out.extend((0..COMMON.len()).map(|i| self.index(1 + i))),
        }
        // The entry moved all those before it.
        for (nth, &command) in self.known.iter().enumerate() {
            let mut block = [INDEXED | METHOD_POST, INDEXED | SCHEME_HTTP, 0, 0, 0, 0];
            // The first path came before the common fields, and the others after them.
            block[2] = self.index(if nth == 0 { 0 } else { COMMON.len() + nth });
            for (i, field) in block[3..].iter_mut().enumerate() {
                *field = self.index(1 + i);
            }
            self.indexed[command as usize] = Some(block);
        }
    }

    /// The field that came so many fields after the first one.
    fn index(&self, nth: usize) -> u8 {
        let entries = self.known.len() + COMMON.len();
        INDEXED | (DYNAMIC + (entries - 1 - nth) as u8)
    }
}

/// Appends a field. Its name and value are short, so that their lengths take a byte each.
fn literal(out: &mut Vec<u8>, representation: u8, name: &[u8], value: &[u8]) {
    debug_assert!(name.len() < 127 && value.len() < 127);
    out.push(representation);
    for text in [name, value] {
        out.push(text.len() as u8);
        out.extend_from_slice(text);
    }
}

/// What a response's header block says, as far as it matters. Zero and `None`: nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Said {
    /// The status of HTTP.
    pub(super) http: u16,
    /// The status of the call. One that is no number is `u32::MAX`.
    pub(super) grpc: Option<u32>,
}

/// Blocks that are remembered: those of the beginning and the end of a response, and of one more kind of response.
const REMEMBERED: usize = 4;
/// Longest of them in bytes. What servers send for each response is much shorter, once their fields are in the table.
const REMEMBERED_BYTES: usize = 64;

/// Reads header blocks of responses.
pub(super) struct Responses {
    decoder: Decoder<'static>,
    /// Blocks and what they say, for as long as the table does not change.
    remembered: Vec<(Vec<u8>, Said)>,
    next: usize,
    /// The words of the last block that had any.
    message: Vec<u8>,
}

impl std::fmt::Debug for Responses {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Responses")
            .field("remembered", &self.remembered)
            .finish()
    }
}

impl Responses {
    pub(super) fn new() -> Self {
        let mut decoder = Decoder::new();
        decoder.set_max_allowed_table_size(TABLE_SIZE as usize);
        Responses {
            decoder,
            remembered: Vec::with_capacity(REMEMBERED),
            next: 0,
            message: Vec::new(),
        }
    }

    /// Reads a block, all of it; `None` if it is none. Blocks have to be read in the order of their coming, each once.
    #[inline(always)]
    pub(super) fn read(&mut self, block: &[u8]) -> Option<Said> {
        match self.remembered.iter().find(|(known, _)| *known == block) {
            Some((_, said)) => Some(*said),
            None => self.decode(block),
        }
    }

    /// The words that the block which was read last has for its status; empty if it has none.
    pub(super) fn message(&self) -> &[u8] {
        &self.message
    }

    #[cold]
    fn decode(&mut self, block: &[u8]) -> Option<Said> {
        self.message.clear();
        let mut said = Said::default();
        let message = &mut self.message;
        let number = |text: &[u8]| std::str::from_utf8(text).ok()?.parse::<u32>().ok();
        let decoded = self.decoder.decode_with_cb(block, |name, value| match &*name {
            b":status" => said.http = number(&value).and_then(|n| u16::try_from(n).ok()).unwrap_or(0),
            b"grpc-status" => said.grpc = Some(number(&value).unwrap_or(u32::MAX)),
            b"grpc-message" => message.extend_from_slice(&value),
            _ => {}
        });
        decoded.ok()?;
        if !leaves_table(block)? {
            self.remembered.clear();
        } else if block.len() <= REMEMBERED_BYTES && self.message.is_empty() {
            let entry = (block.to_vec(), said);
            self.next = (self.next + 1) % REMEMBERED;
            match self.remembered.get_mut(self.next) {
                Some(oldest) => *oldest = entry,
                None => self.remembered.push(entry),
            }
        }
        Some(said)
    }
}

/// Whether the table is the same behind this block as before it; `None` if it is no block.
fn leaves_table(block: &[u8]) -> Option<bool> {
    let mut at = 0;
    while at < block.len() {
        match block[at] {
            0x80.. => drop(integer(block, &mut at, 7)?),
            0x20.. => return Some(false),
            _ => {
                // Literals: an index or else a name, and a value.
                let strings = if integer(block, &mut at, 4)? == 0 { 2 } else { 1 };
                for _ in 0..strings {
                    at += integer(block, &mut at, 7)?;
                }
            }
        }
    }
    (at == block.len()).then_some(true)
}

/// Reads the number at `*at`, the first byte of which has so many bits for it.
fn integer(block: &[u8], at: &mut usize, bits: u32) -> Option<usize> {
    let full = (1 << bits) - 1;
    let mut n = usize::from(*block.get(*at)?) & full;
    *at += 1;
    if n < full {
        return Some(n);
    }
    for shift in [0, 7, 14, 21] {
        let byte = *block.get(*at)?;
        *at += 1;
        n += usize::from(byte & 127) << shift;
        if byte < 128 {
            return Some(n);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use loona_hpack::Encoder;

    fn fields(decoder: &mut Decoder<'_>, block: &[u8]) -> Vec<(String, String)> {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        let decoded = decoder.decode(block).unwrap();
        decoded
            .into_iter()
            .map(|(name, value)| (text(name), text(value)))
            .collect()
    }

    #[test]
    fn requests_say_the_same_whatever_the_server_knows() {
        let mut decoder = Decoder::new();
        let mut requests = Requests::new();
        let all = [Command::Set, Command::Get, Command::Delete];
        let order = [0, 0, 1, 0, 1, 2, 0, 1, 2];
        for (i, which) in order.into_iter().enumerate() {
            if i == 7 {
                requests.table_size(TABLE_SIZE);
            }
            let command = all[which];
            let first = !order[..i].contains(&which);
            assert_eq!(requests.indexed(command).is_none(), first);
            let mut block = Vec::new();
            requests.append(command, &mut block);
            assert_eq!(block.len() == INDEXED_BLOCK, !first, "{block:?}");
            check(fields(&mut decoder, &block), command);
        }
        // From here on everything is written out, and the decoder hears of it.
        requests.table_size(100);
        requests.table_size(0);
        for i in 0..3 {
            let mut block = Vec::new();
            assert_eq!(requests.indexed(Command::Get), None);
            requests.append(Command::Get, &mut block);
            assert_eq!(block[0] == TABLE_OF_NOTHING, i == 0);
            decoder.set_max_allowed_table_size(0);
            check(fields(&mut decoder, &block), Command::Get);
        }

        fn check(mut got: Vec<(String, String)>, command: Command) {
            assert!(got[..4].iter().all(|(name, _)| name.starts_with(':')));
            got.sort();
            let path = std::str::from_utf8(path(command)).unwrap();
            let expected = [
                (":authority", "localhost"),
                (":method", "POST"),
                (":path", path),
                (":scheme", "http"),
                ("content-type", "application/grpc"),
                ("te", "trailers"),
            ];
            assert_eq!(got, expected.map(|(n, v)| (n.to_string(), v.to_string())));
        }
    }

    #[test]
    fn responses_are_read_and_remembered() {
        let mut encoder = Encoder::new();
        let mut responses = Responses::new();
        let said = |http, grpc| Said { http, grpc };
        for _ in 0..3 {
            for (fields, expected) in [
                (
                    &[(":status", "200"), ("content-type", "application/grpc")][..],
                    said(200, None),
                ),
                (&[("grpc-status", "0")], said(0, Some(0))),
                (&[("x-what", "else"), ("grpc-status", "5")], said(0, Some(5))),
                (&[(":status", "503")], said(503, None)),
                (&[("grpc-status", "many")], said(0, Some(u32::MAX))),
            ] {
                let block = encoder.encode(fields.iter().map(|(n, v)| (n.as_bytes(), v.as_bytes())));
                assert_eq!(responses.read(&block), Some(expected));
                assert_eq!(responses.message(), b"");
            }
        }
        // The third time around nothing was new to the table.
        assert!(!responses.remembered.is_empty());
        // The same bytes mean something else once the table has changed.
        let status = encoder.encode([(&b"grpc-status"[..], &b"0"[..])]);
        assert_eq!(responses.read(&status), Some(said(0, Some(0))));
        let new = encoder.encode([(&b"x-new"[..], &b"field"[..]), (b"grpc-status", b"7")]);
        assert_eq!(responses.read(&new), Some(said(0, Some(7))));
        assert_ne!(responses.read(&status), Some(said(0, Some(0))));

        // A name and a value that are written out, plain and in Huffman's code (RFC 7541, C.4.1 has such a value).
        let mut plain = Vec::new();
        literal(&mut plain, NOT_KEPT, b"grpc-status", b"8");
        literal(&mut plain, NOT_KEPT, b"grpc-message", b"full");
        assert_eq!(responses.read(&plain), Some(said(0, Some(8))));
        assert_eq!(responses.message(), b"full");
        let mut coded = vec![NOT_KEPT, 12];
        coded.extend_from_slice(b"grpc-message\x8c\xf1\xe3\xc2\xe5\xf2\x3a\x6b\xa0\xab\x90\xf4\xff");
        assert_eq!(responses.read(&coded), Some(said(0, None)));
        assert_eq!(responses.message(), b"www.example.com");

        for nonsense in [&[0xff][..], &[0xfe], &[0x00], &[0x00, 1, b'a', 5, b'b'], &[0x80]] {
            assert_eq!(Responses::new().read(nonsense), None, "{nonsense:?}");
        }
    }

    #[test]
    fn blocks_that_leave_the_table_are_known() {
        assert_eq!(leaves_table(&[0x88, 0xbe]), Some(true));
        assert_eq!(leaves_table(&[0xff, 0x80, 0x01, 0x88]), Some(true));
        assert_eq!(leaves_table(&[0x0f, 0x0d, 1, b'1', 0x88]), Some(true));
        assert_eq!(leaves_table(&[0x10, 1, b'a', 1, b'b']), Some(true));
        assert_eq!(leaves_table(&[0x88, 0x40, 1, b'a', 1, b'b']), Some(false));
        assert_eq!(leaves_table(&[0x20, 0x88]), Some(false));
        assert_eq!(leaves_table(&[0x00, 1, b'a', 9, b'b']), None);
        assert_eq!(leaves_table(&[0xff]), None);
    }
}
