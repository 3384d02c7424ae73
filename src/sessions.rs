//! The connections of one core by number, and which of them the runtime is to look after.

use crate::session::Session;

/// See the module's text.
#[derive(Default)]
pub(crate) struct Sessions {
    /// By number; `None` where there is none, and while it is taken out.
    sessions: Vec<Option<Box<Session>>>,
    free: Vec<u32>,
    attention: Vec<u32>,
    connections: u64,
}

impl Sessions {
    /// Takes a session in. The number names it until it is forgotten.
    pub(crate) fn add(&mut self, session: Session) -> u32 {
        self.connections += u64::from(session.end.is_connection());
        let session = Some(Box::new(session));
        match self.free.pop() {
            Some(id) => {
                self.sessions[id as usize] = session;
                id
            }
            None => {
                self.sessions.push(session);
                (self.sessions.len() - 1) as u32
            }
        }
    }

    /// Takes a session out, so that it and the rest of the engine can be used side by side.
    #[inline]
    pub(crate) fn take(&mut self, id: u32) -> Option<Box<Session>> {
        self.sessions.get_mut(id as usize)?.take()
    }

    /// Puts back what was taken out, and has the runtime look after it.
    #[inline]
    pub(crate) fn put_back(&mut self, id: u32, mut session: Box<Session>) {
        if !session.listed {
            session.listed = true;
            self.attention.push(id);
        }
        self.restore(id, session);
    }

    /// Puts back what was taken out, with nothing for the runtime to do about it.
    #[inline]
    pub(crate) fn restore(&mut self, id: u32, session: Box<Session>) {
        self.sessions[id as usize] = Some(session);
    }

    /// A session that is there.
    #[inline]
    pub(crate) fn get_mut(&mut self, id: u32) -> Option<&mut Session> {
        self.sessions[id as usize].as_deref_mut()
    }

    /// All that are there, with their numbers.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &Session)> {
        (0..)
            .zip(&self.sessions)
            .filter_map(|(id, session)| Some((id, session.as_deref()?)))
    }

    /// Numbers that may be in use.
    pub(crate) fn ids(&self) -> std::ops::Range<u32> {
        0..self.sessions.len() as u32
    }

    /// The next one for the runtime to look after.
    #[inline]
    pub(crate) fn next_attention(&mut self) -> Option<u32> {
        loop {
            let id = self.attention.pop()?;
            if let Some(session) = &mut self.sessions[id as usize] {
                session.listed = false;
                if session.socket_closed {
                    self.forget_if_done(id);
                    continue;
                }
                return Some(id);
            }
        }
    }

    /// Its socket is closed, or its caller is gone. The session is forgotten when its last reply has come.
    pub(crate) fn close(&mut self, id: u32, mut session: Box<Session>) {
        session.socket_closed = true;
        self.connections -= u64::from(session.end.is_connection());
        self.restore(id, session);
        self.forget_if_done(id);
    }

    /// Frees the session when neither a socket nor a reply can name it any more.
    fn forget_if_done(&mut self, id: u32) {
        if let Some(session) = &self.sessions[id as usize]
            && session.socket_closed
            && session.in_flight() == 0
            && !session.listed
        {
            self.sessions[id as usize] = None;
            self.free.push(id);
        }
    }

    /// Open connections.
    pub(crate) fn connections(&self) -> u64 {
        self.connections
    }
}
