use super::*;
use loona_hpack::Encoder;

const SERVED: &[(&str, &str)] = &[(":status", "200"), ("content-type", "application/grpc")];
const DONE: &[(&str, &str)] = &[("grpc-status", "0")];

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    push_frame(&mut out, payload.len(), kind, flags, stream);
    out.extend_from_slice(payload);
    out
}

fn settings(entries: &[(u16, u32)]) -> Vec<u8> {
    let mut payload = Vec::new();
    for (setting, value) in entries {
        payload.extend_from_slice(&setting.to_be_bytes());
        payload.extend_from_slice(&value.to_be_bytes());
    }
    frame(kind::SETTINGS, 0, 0, &payload)
}

fn window_update(stream: u32, more: u32) -> Vec<u8> {
    frame(kind::WINDOW_UPDATE, 0, stream, &more.to_be_bytes())
}

/// The server's end: header blocks depend on those before them.
struct Far(Encoder<'static>);

impl Far {
    fn new() -> Self {
        Far(Encoder::new())
    }

    fn headers(&mut self, stream: u32, end: bool, fields: &[(&str, &str)]) -> Vec<u8> {
        let block = self.0.encode(fields.iter().map(|(n, v)| (n.as_bytes(), v.as_bytes())));
        let flags = flag::END_HEADERS | if end { flag::END_STREAM } else { 0 };
        frame(kind::HEADERS, flags, stream, &block)
    }

    /// A whole response in three frames.
    fn response(&mut self, stream: u32, body: &[u8]) -> Vec<u8> {
        [
            self.headers(stream, false, SERVED),
            frame(kind::DATA, 0, stream, body),
            self.headers(stream, true, DONE),
        ]
        .concat()
    }
}

/// A session, what it sent, and the answers that it got by place.
struct Near {
    session: Http2,
    out: Vec<u8>,
    carry: Vec<u8>,
    answers: Vec<(usize, Result<Vec<u8>, String>)>,
    closed: bool,
}

impl Near {
    fn new(places: usize) -> Self {
        let mut out = Vec::new();
        let session = Http2::open(places, &mut out);
        assert!(out.starts_with(PREFACE));
        let mut near = Near {
            session,
            out: out.split_off(PREFACE.len()),
            carry: Vec::new(),
            answers: Vec::new(),
            closed: false,
        };
        let first: Vec<_> = near.sent().iter().map(|(kind, ..)| *kind).collect();
        assert_eq!(first, [kind::SETTINGS, kind::WINDOW_UPDATE]);
        near
    }

    /// One whose server has told these settings, and been told that they were read.
    fn settled(places: usize, entries: &[(u16, u32)]) -> Self {
        let mut near = Near::new(places);
        near.hear(&settings(entries)).unwrap();
        assert_eq!(near.sent(), [(kind::SETTINGS, flag::ACK, 0, vec![])]);
        near
    }

    fn ask(&mut self, place: usize, command: Command, message: &[u8]) {
        let start = self.out.len();
        self.out.extend_from_slice(&[0; ROOM]);
        self.out.extend_from_slice(message);
        self.session.requested(place, command, &mut self.out, start);
    }

    /// Takes in bytes; an error when they break the rules.
    fn hear(&mut self, bytes: &[u8]) -> Result<(), ()> {
        self.carry.extend_from_slice(bytes);
        loop {
            match self.session.read(&self.carry, &mut self.out) {
                Parsed::Incomplete => return Ok(()),
                Parsed::Malformed => return Err(()),
                Parsed::Done(event, len) => {
                    self.carry.drain(..len);
                    match event {
                        Event::Nothing => {}
                        Event::Closing => self.closed = true,
                        Event::Answered(place) => {
                            let answer = self.session.answer(place);
                            let text = |words: &[u8]| String::from_utf8(words.to_vec()).unwrap();
                            self.answers.push((place, answer.map(<[u8]>::to_vec).map_err(text)));
                        }
                    }
                }
            }
        }
    }

    /// The frames sent since the last call: kind, flags, stream and payload.
    fn sent(&mut self) -> Vec<(u8, u8, u32, Vec<u8>)> {
        let (mut frames, mut rest) = (Vec::new(), &self.out[..]);
        while let Some((header, behind)) = rest.split_first_chunk::<FRAME_HEADER>() {
            let [a, b, c, kind, flags, stream @ ..] = *header;
            let (payload, behind) = behind.split_at(u32::from_be_bytes([0, a, b, c]) as usize);
            frames.push((kind, flags, u32::from_be_bytes(stream), payload.to_vec()));
            rest = behind;
        }
        assert!(rest.is_empty());
        self.out.clear();
        frames
    }

    /// The streams whose header blocks were sent since the last call, and the bytes of messages.
    fn streams(&mut self) -> (Vec<u32>, usize) {
        let (mut streams, mut bytes) = (Vec::new(), 0);
        for (kind, _, stream, payload) in self.sent() {
            match kind {
                kind::HEADERS => streams.push(stream),
                kind::DATA => bytes += payload.len(),
                _ => {}
            }
        }
        (streams, bytes)
    }
}

#[test]
fn calls_of_any_fragmentation() {
    for size in [1, 2, 7, 9, 10, 1000] {
        let (mut near, mut far) = (Near::new(4), Far::new());
        near.ask(0, Command::Set, b"first");
        near.ask(1, Command::Get, b"second");
        assert!(near.sent().is_empty(), "the server has not told its settings");
        let mut bytes = settings(&[]);
        bytes.extend(frame(kind::PING, 0, 0, b"12345678"));
        // Frames that no one knows, and priorities, mean nothing.
        bytes.extend(frame(0x77, 0xff, 9, b"what"));
        bytes.extend(frame(2, 0, 1, &[0; 5]));
        bytes.extend(far.response(1, b"one"));
        bytes.extend(far.response(3, b"two"));
        for piece in bytes.chunks(size) {
            near.hear(piece).unwrap();
        }
        assert_eq!(near.answers, [(0, Ok(b"one".to_vec())), (1, Ok(b"two".to_vec()))]);
        let mut sent = near.sent();
        let mut messages = sent.extract_if(.., |(kind, ..)| *kind == kind::DATA);
        assert_eq!(
            messages.next(),
            Some((kind::DATA, flag::END_STREAM, 1, b"first".to_vec()))
        );
        assert_eq!(
            messages.next(),
            Some((kind::DATA, flag::END_STREAM, 3, b"second".to_vec()))
        );
        drop(messages);
        assert!(sent.contains(&(kind::SETTINGS, flag::ACK, 0, vec![])));
        assert!(sent.contains(&(kind::PING, flag::ACK, 0, b"12345678".to_vec())));
        assert_eq!(near.session.open, 0);
        // The server knows all of these fields now, so that they leave as they were written.
        near.ask(0, Command::Get, b"third");
        let sent = near.sent();
        assert_eq!(
            (sent[0].0, sent[0].2, sent[0].3.len()),
            (kind::HEADERS, 5, INDEXED_BLOCK)
        );
        assert_eq!(sent[1], (kind::DATA, flag::END_STREAM, 5, b"third".to_vec()));
    }
}

#[test]
fn answers_come_in_any_order_and_interleaved() {
    let (mut near, mut far) = (Near::settled(4, &[]), Far::new());
    for (place, message) in [b"a", b"b", b"c", b"d"].into_iter().enumerate() {
        near.ask(place, Command::Get, message);
    }
    let bytes = [
        far.headers(7, false, SERVED),
        far.headers(3, false, SERVED),
        frame(kind::DATA, 0, 3, b"th"),
        frame(kind::DATA, flag::PADDED, 7, b"\x03seven\0\0\0"),
        frame(kind::DATA, 0, 3, b"ree"),
        far.headers(7, true, DONE),
        far.headers(3, true, DONE),
    ];
    near.hear(&bytes.concat()).unwrap();
    assert_eq!(near.answers, [(3, Ok(b"seven".to_vec())), (1, Ok(b"three".to_vec()))]);
    near.answers.clear();
    // What is left moves, as the worker has it move.
    near.session.swap(1, 2);
    near.session.swap(0, 3);
    near.ask(0, Command::Get, b"e");
    let bytes = [
        far.response(5, b"five"),
        far.response(9, b"nine"),
        far.response(1, b"one"),
    ];
    near.hear(&bytes.concat()).unwrap();
    let expected = [(1, b"five".to_vec()), (0, b"nine".to_vec()), (3, b"one".to_vec())];
    assert_eq!(near.answers, expected.map(|(place, body)| (place, Ok(body))));
}

#[test]
fn header_blocks_in_pieces_and_interim_ones() {
    let (mut near, mut far) = (Near::settled(1, &[]), Far::new());
    near.ask(0, Command::Get, b"a");
    let interim = far.headers(1, false, &[(":status", "103"), ("link", "x")]);
    let whole = far.headers(1, false, SERVED);
    let block = &whole[FRAME_HEADER..];
    let with_priority = [&[0, 0, 0, 0, 9], &block[..2]].concat();
    let bytes = [
        interim,
        frame(kind::HEADERS, flag::PRIORITY, 1, &with_priority),
        frame(kind::CONTINUATION, 0, 1, &block[2..5]),
        frame(kind::CONTINUATION, flag::END_HEADERS, 1, &block[5..]),
        far.headers(1, true, DONE),
    ];
    near.hear(&bytes.concat()).unwrap();
    assert_eq!(near.answers, [(0, Ok(vec![]))]);

    // Nothing may come between, and not without end.
    let open = frame(kind::HEADERS, 0, 1, &[0; 100]);
    for next in [
        frame(kind::CONTINUATION, flag::END_HEADERS, 3, b""),
        frame(kind::PING, 0, 0, b"12345678"),
    ] {
        let mut near = Near::settled(1, &[]);
        near.ask(0, Command::Get, b"a");
        near.hear(&open).unwrap();
        assert!(near.hear(&next).is_err());
    }
    let mut near = Near::settled(1, &[]);
    near.ask(0, Command::Get, b"a");
    near.hear(&open).unwrap();
    let more = frame(kind::CONTINUATION, 0, 1, &[0; DEFAULT_FRAME]);
    let end = (0..10).find(|_| near.hear(&more).is_err());
    assert_eq!(end, Some(BLOCK_MAX / DEFAULT_FRAME - 1));
}

#[test]
fn failures_say_why() {
    let reset = |code: u32| frame(kind::RST_STREAM, 0, 1, &code.to_be_bytes());
    let mut far = Far::new();
    for (bytes, words) in [
        (reset(7), "RST_STREAM: REFUSED_STREAM"),
        (reset(99), "RST_STREAM: error 99"),
        (
            far.headers(
                1,
                true,
                &[(":status", "200"), ("grpc-status", "8"), ("grpc-message", "too large")],
            ),
            "grpc-status 8: too large",
        ),
        (
            [
                far_headers(&[(":status", "200")], false),
                far_headers(&[("grpc-status", "9")], true),
            ]
            .concat(),
            "grpc-status 9: ",
        ),
        (far_headers(&[(":status", "415")], true), "HTTP status 415"),
        (
            far_headers(&[(":status", "200")], true),
            "the response has no grpc-status",
        ),
        (
            [
                far_headers(&[(":status", "200")], false),
                frame(kind::DATA, flag::END_STREAM, 1, b"x"),
            ]
            .concat(),
            "the response has no grpc-status",
        ),
        (
            [
                far_headers(&[(":status", "503")], false),
                frame(kind::DATA, flag::END_STREAM, 1, b"x"),
            ]
            .concat(),
            "HTTP status 503",
        ),
    ] {
        let mut near = Near::settled(2, &[]);
        near.ask(0, Command::Get, b"a");
        near.hear(&bytes).unwrap();
        assert_eq!(near.answers, [(0, Err(words.to_string()))]);
        assert_eq!(near.session.open, 0);
    }
    let mut near = Near::settled(1, &[]);
    near.hear(&frame(kind::GOAWAY, 0, 0, b"\0\0\0\x01\0\0\0\x0btoo_many_resets"))
        .unwrap();
    assert!(near.closed);
    assert_eq!(near.session.closing(), "GOAWAY: ENHANCE_YOUR_CALM, too_many_resets");

    fn far_headers(fields: &[(&str, &str)], end: bool) -> Vec<u8> {
        // Without the table, so that each can stand alone.
        let mut block = Vec::new();
        for (name, value) in fields {
            block.extend_from_slice(&[0, name.len() as u8]);
            block.extend_from_slice(name.as_bytes());
            block.push(value.len() as u8);
            block.extend_from_slice(value.as_bytes());
        }
        let flags = flag::END_HEADERS | if end { flag::END_STREAM } else { 0 };
        frame(kind::HEADERS, flags, 1, &block)
    }
}

#[test]
fn the_number_of_streams_is_obeyed() {
    let (mut near, mut far) = (Near::settled(8, &[(setting::MAX_CONCURRENT_STREAMS, 2)]), Far::new());
    for place in 0..5 {
        near.ask(place, Command::Get, b"message");
    }
    assert_eq!(near.streams(), (vec![1, 3], 14));
    near.hear(&far.response(3, b"")).unwrap();
    assert_eq!(near.streams(), (vec![5], 7));
    // More may be open now, and then fewer.
    near.hear(&settings(&[(setting::MAX_CONCURRENT_STREAMS, 3)])).unwrap();
    assert_eq!(near.streams(), (vec![7], 7));
    near.hear(&settings(&[(setting::MAX_CONCURRENT_STREAMS, 0)])).unwrap();
    for stream in [1, 7, 5] {
        near.hear(&far.response(stream, b"")).unwrap();
    }
    assert_eq!(near.streams(), (vec![], 0));
    // To one that has not left nothing can be said.
    assert!(near.hear(&far.response(9, b"")).is_err());
}

#[test]
fn the_servers_windows_are_obeyed() {
    let message = [b'm'; 50_000];
    let (mut near, mut far) = (Near::settled(8, &[(setting::INITIAL_WINDOW_SIZE, 30_000)]), Far::new());
    for place in 0..3 {
        near.ask(place, Command::Set, &message);
    }
    // The window of the stream, in frames of no more than the least that servers take.
    let sent = near.sent();
    let lens: Vec<_> = sent
        .iter()
        .filter(|f| f.0 == kind::DATA)
        .map(|f| (f.1, f.3.len()))
        .collect();
    assert_eq!(lens, [(0, DEFAULT_FRAME), (0, 30_000 - DEFAULT_FRAME)]);
    // The rest of it: 20,000. Then that of the connection: 15,535 of the next.
    near.hear(&window_update(1, 20_000)).unwrap();
    assert_eq!(near.streams(), (vec![3], 20_000 + 15_535));
    near.hear(&window_update(0, 1_000_000)).unwrap();
    assert_eq!(near.streams(), (vec![], 30_000 - 15_535));
    // A smaller window first has to be filled up to where it was.
    near.hear(&settings(&[(setting::INITIAL_WINDOW_SIZE, 29_000)])).unwrap();
    near.hear(&window_update(3, 1_500)).unwrap();
    assert_eq!(near.streams(), (vec![], 500));
    near.hear(&settings(&[
        (setting::INITIAL_WINDOW_SIZE, 100_000),
        (setting::MAX_FRAME_SIZE, 1 << 20),
    ]))
    .unwrap();
    assert_eq!(near.streams(), (vec![5], 19_500 + 50_000));
    for stream in [1, 3, 5] {
        near.hear(&far.response(stream, b"ok")).unwrap();
    }
    assert_eq!(near.answers.len(), 3);
    near.ask(0, Command::Set, &message);
    assert_eq!(near.sent().len(), 2, "one frame is enough now");
}

#[test]
fn answers_before_the_request_has_left() {
    let message = [b'm'; 100_000];
    for early in ["response", "reset"] {
        let (mut near, mut far) = (Near::settled(2, &[]), Far::new());
        near.ask(0, Command::Set, &message);
        near.ask(1, Command::Get, b"next");
        assert_eq!(near.streams(), (vec![1], DEFAULT_WINDOW as usize));
        match early {
            "response" => near
                .hear(&far.headers(1, true, &[(":status", "200"), ("grpc-status", "8")]))
                .unwrap(),
            _ => near.hear(&frame(kind::RST_STREAM, 0, 1, &7u32.to_be_bytes())).unwrap(),
        }
        near.hear(&window_update(0, 100)).unwrap();
        assert!(matches!(near.answers[..], [(0, Err(_))]));
        let sent = near.sent();
        let cancelled = sent.iter().any(|f| f.0 == kind::RST_STREAM && f.2 == 1);
        assert_eq!(cancelled, early == "response");
        assert!(sent.iter().any(|f| f.0 == kind::DATA && f.2 == 3 && f.3 == b"next"));
        // A server may have said more before it heard of that.
        if cancelled {
            near.hear(&frame(kind::DATA, 0, 1, b"late")).unwrap();
        }
        near.hear(&frame(kind::RST_STREAM, 0, 1, &[0; 4])).unwrap();
        near.hear(&window_update(1, 100)).unwrap();
        assert_eq!(near.session.open, 1);
    }
}

#[test]
fn the_connections_window_is_filled_again() {
    let (mut near, mut far) = (Near::settled(1, &[]), Far::new());
    let piece = frame(kind::DATA, 0, 1, &[b'v'; DEFAULT_FRAME]);
    near.ask(0, Command::Get, b"key");
    near.sent();
    near.hear(&far.headers(1, false, SERVED)).unwrap();
    let pieces = WINDOW as usize / 2 / DEFAULT_FRAME;
    for i in 0..pieces {
        assert!(near.sent().is_empty(), "{i}");
        near.hear(&piece).unwrap();
        near.session.calls[0].body.clear();
    }
    let told = (kind::WINDOW_UPDATE, 0, 0, (WINDOW / 2).to_be_bytes().to_vec());
    assert_eq!(near.sent(), [told]);
}

#[test]
fn streams_run_out() {
    let (mut near, mut far) = (Near::settled(2, &[]), Far::new());
    near.session.next = IDS_END - 3;
    near.ask(0, Command::Get, b"key");
    assert_eq!(near.session.spent(), None);
    near.ask(1, Command::Get, b"key");
    assert!(near.session.spent().unwrap().contains("1,073,741,824"));
    assert_eq!(near.streams().0, [IDS_END - 3, IDS_END - 1]);
    near.hear(&far.response(IDS_END - 1, b"last")).unwrap();
    assert_eq!(near.answers, [(1, Ok(b"last".to_vec()))]);
}

#[test]
fn what_breaks_the_rules_is_malformed() {
    // Not HTTP/2, or not from its beginning.
    for bytes in [
        &b"HTTP/1.1 400 Bad Request\r\n"[..],
        &frame(kind::PING, 0, 0, b"12345678"),
        &frame(kind::SETTINGS, flag::ACK, 0, b""),
    ] {
        assert!(Near::new(1).hear(bytes).is_err());
    }
    let mut far = Far::new();
    let begun = far.headers(1, false, SERVED);
    for bytes in [
        settings(&[(setting::INITIAL_WINDOW_SIZE, 1 << 31)]),
        settings(&[(setting::MAX_FRAME_SIZE, 100)]),
        frame(kind::SETTINGS, 0, 0, b"12345"),
        frame(kind::SETTINGS, 0, 1, b""),
        frame(kind::PING, 0, 0, b"1"),
        frame(kind::PING, 0, 1, b"12345678"),
        frame(kind::GOAWAY, 0, 0, b"1234"),
        frame(kind::PUSH_PROMISE, flag::END_HEADERS, 1, &[0, 0, 0, 2]),
        frame(kind::CONTINUATION, flag::END_HEADERS, 1, b""),
        frame(kind::RST_STREAM, 0, 1, b"123"),
        frame(kind::RST_STREAM, 0, 2, b"1234"),
        window_update(0, 0),
        window_update(0, (1 << 31) - 1),
        window_update(3, 1),
        frame(kind::DATA, 0, 1, b"before the headers"),
        frame(kind::DATA, 0, 3, b"for nobody"),
        frame(kind::DATA, 0, 0, b"for nobody"),
        [&begun[..], &frame(kind::DATA, flag::PADDED, 1, b"\x05abc")].concat(),
        [&begun[..], &frame(kind::DATA, flag::PADDED, 1, b"")].concat(),
        // The second block of a response is its end.
        [&begun[..], &frame(kind::HEADERS, flag::END_HEADERS, 1, &[0x88])].concat(),
        frame(kind::HEADERS, flag::END_HEADERS, 1, &[0xff]),
        frame(kind::HEADERS, flag::END_HEADERS | flag::PRIORITY, 1, &[0; 4]),
        frame(kind::HEADERS, flag::END_HEADERS, 5, &[0x88]),
        frame(0x77, 0, 0, &[0; DEFAULT_FRAME + 1]),
    ] {
        let mut near = Near::settled(1, &[]);
        near.ask(0, Command::Get, b"a");
        assert!(near.hear(&bytes).is_err(), "{:?}", &bytes[..bytes.len().min(60)]);
    }
    // An answer twice.
    let (mut near, mut far) = (Near::settled(1, &[]), Far::new());
    near.ask(0, Command::Get, b"a");
    near.hear(&far.response(1, b"x")).unwrap();
    assert!(near.hear(&far.response(1, b"x")).is_err());
}
