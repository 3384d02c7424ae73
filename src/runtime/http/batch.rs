//! `POST /keys:batch`: several operations at one instant, all or none.
//!
//! ```json
//! {"operations": [{"op": "get", "key": "a"},
//!                 {"op": "put", "key": "b", "value": "2", "ttl_ms": 60000, "if_none_match": "*"},
//!                 {"op": "delete", "key_base64": "/w==", "if_match": "00000000000004d2"}]}
//! ```
//! answers `{"results": [{"status": 200, "value": "1", "flags": 0, "etag": "..."}, {"status": 201}, {"status": 404}]}`, in the order
//! of the operations. When a condition does not hold, nothing is done, and the status is 412.

use super::conditions::{failed, tag, version_of};
use super::{Body, Handler, JSON, Problem, Result, TextualValue, json, no_memory, read_only};
use crate::model::{Check, Command, Condition, Deadline, Delete, Op, Put, Transaction, TxnEnd, UnixMillis, Value};
use crate::protocol::call::{Answer, Outcome};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use hyper::body::{Body as _, Incoming};
use hyper::{Request, Response, StatusCode, header};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Batch {
    operations: Vec<Operation>,
    /// The answer comes when what it tells is safe. The query may say so, too.
    #[serde(default)]
    durable: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Get,
    Put,
    Delete,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Operation {
    op: Kind,
    #[serde(default, deserialize_with = "given")]
    key: Option<String>,
    #[serde(default, deserialize_with = "given")]
    key_base64: Option<String>,
    #[serde(default, deserialize_with = "given")]
    value: Option<String>,
    #[serde(default, deserialize_with = "given")]
    value_base64: Option<String>,
    #[serde(default, deserialize_with = "whole")]
    flags: Option<u32>,
    #[serde(default, deserialize_with = "whole")]
    ttl_ms: Option<u64>,
    #[serde(default, deserialize_with = "given")]
    if_match: Option<String>,
    #[serde(default, deserialize_with = "given")]
    if_none_match: Option<String>,
}

/// A field that may be left out, but not be null: a condition that a client means to give and does not is no condition.
fn given<'a, T: Deserialize<'a>, D: Deserializer<'a>>(field: D) -> std::result::Result<Option<T>, D::Error> {
    T::deserialize(field).map(Some)
}

/// The same of a whole number. 1.0 is one: JSON has one kind of numbers.
fn whole<'a, T: TryFrom<u64>, D: Deserializer<'a>>(field: D) -> std::result::Result<Option<T>, D::Error> {
    const TWO_TO_64: f64 = 18_446_744_073_709_551_616.0;
    let number = serde_json::Number::deserialize(field)?;
    let whole = number.as_u64().or_else(|| {
        let float = number.as_f64()?;
        (float.fract() == 0.0 && (0.0..TWO_TO_64).contains(&float)).then_some(float as u64)
    });
    let fits = whole.and_then(|whole| T::try_from(whole).ok()).map(Some);
    fits.ok_or_else(|| D::Error::custom(format!("{number} is no whole number, or too large")))
}

/// An operation, understood.
struct Understood {
    kind: Kind,
    key: Vec<u8>,
    value: Vec<u8>,
    flags: u32,
    deadline: Deadline,
    condition: Condition,
}

#[derive(Serialize)]
struct Outcomes<'a> {
    results: Vec<Shown<'a>>,
}

#[derive(Serialize)]
struct Shown<'a> {
    status: u16,
    #[serde(flatten)]
    item: Option<Found<'a>>,
}

#[derive(Serialize)]
struct Found<'a> {
    #[serde(flatten)]
    value: TextualValue<'a>,
    flags: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at_ms: Option<u64>,
    etag: String,
}

/// Bytes given as text or in base64, exactly one of the two.
fn bytes(what: &str, number: usize, text: Option<String>, base64: Option<String>) -> Result<Vec<u8>> {
    match (text, base64) {
        (Some(text), None) => Ok(text.into_bytes()),
        (None, Some(base64)) => BASE64_STANDARD
            .decode(base64)
            .map_err(|error| Problem::bad(format!("operation {number}: {what}_base64 is no base64: {error}"))),
        _ => Err(Problem::bad(format!(
            "operation {number} needs {what} or {what}_base64"
        ))),
    }
}

impl Handler {
    pub(super) async fn batch(&self, request: Request<Incoming>) -> Result<Response<Body>> {
        let headers = request.headers();
        self.check_source(headers).map_err(Problem::and_close)?;
        let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let media_type = content_type.unwrap_or_default().split(';').next().unwrap_or_default();
        if !media_type.trim().eq_ignore_ascii_case(JSON) || headers.contains_key(header::CONTENT_ENCODING) {
            let detail = "a batch is application/json, without a Content-Encoding";
            return Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, detail).and_close());
        }
        let most = usize::try_from(self.config.limits.request_bytes_max()).unwrap_or(usize::MAX);
        let mut body = request.into_body();
        if body.size_hint().lower() > most as u64 {
            return Err(super::too_large(body.size_hint().lower() as usize, most));
        }
        let body = self.collect(&mut body, most).await?;
        let batch: Batch =
            serde_json::from_slice(&body).map_err(|error| Problem::bad(format!("the batch is malformed: {error}")))?;
        drop(body);
        let keys_max = self.config.limits.request_keys_max as usize;
        match batch.operations.len() {
            0 => return Err(Problem::bad("the batch has no operations")),
            count if count > keys_max => {
                let detail = format!("the batch has {count} operations, and the most is {keys_max}");
                return Err(Problem::new(StatusCode::PAYLOAD_TOO_LARGE, detail));
            }
            _ => {}
        }
        let now = self.calls.now();
        let understood: Result<Vec<Understood>> = (1..)
            .zip(batch.operations)
            .map(|(number, operation)| self.understand(number, operation, now))
            .collect();
        let understood = understood?;
        let durable = batch.durable.then(|| self.durable());
        let answers = durable.as_ref().unwrap_or(self).transact(&understood).await?;
        let results = understood.iter().zip(&answers);
        let results = results
            .map(|(operation, answer)| show(operation.kind, answer))
            .collect();
        Ok(json(StatusCode::OK, &Outcomes { results }))
    }

    fn understand(&self, number: usize, operation: Operation, now: UnixMillis) -> Result<Understood> {
        let bad = |detail: &str| Problem::bad(format!("operation {number}: {detail}"));
        let key = bytes("key", number, operation.key, operation.key_base64)?;
        self.check_key(&key)
            .map_err(|problem| Problem::bad(format!("operation {number}: {}", problem.detail)))?;
        let is_put = operation.op == Kind::Put;
        let value = if is_put {
            bytes("value", number, operation.value, operation.value_base64)?
        } else if operation.value.is_some() || operation.value_base64.is_some() {
            return Err(bad("only put has a value"));
        } else {
            vec![]
        };
        if value.len() > self.value_bytes_max() {
            let detail = format!(
                "operation {number}: the value has {} bytes, and the most is {}",
                value.len(),
                self.value_bytes_max()
            );
            return Err(Problem::new(StatusCode::PAYLOAD_TOO_LARGE, detail));
        }
        if !is_put && (operation.flags.is_some() || operation.ttl_ms.is_some()) {
            return Err(bad("only put has flags and ttl_ms"));
        }
        let deadline = match operation.ttl_ms {
            None => Deadline::Never,
            Some(0) => return Err(bad("ttl_ms is more than nothing")),
            Some(ttl_ms) => Deadline::At(UnixMillis(now.0.saturating_add(ttl_ms))),
        };
        let condition = match (operation.if_match.as_deref(), operation.if_none_match.as_deref()) {
            (None, None) => Condition::Always,
            (Some("*"), None) => Condition::Present,
            (Some(tag), None) => Condition::VersionIs(version_of(tag)),
            (None, Some("*")) => Condition::Absent,
            _ => {
                return Err(bad(
                    "if_match is * or one etag, if_none_match is *, and only one of them is given",
                ));
            }
        };
        Ok(Understood {
            kind: operation.op,
            key,
            value,
            flags: operation.flags.unwrap_or(0),
            deadline,
            condition,
        })
    }

    async fn transact(&self, operations: &[Understood]) -> Result<Vec<Answer>> {
        let checks = operations
            .iter()
            .filter(|operation| operation.condition != Condition::Always);
        let checks: Vec<Check<'_>> = checks
            .map(|operation| Check {
                key: &operation.key,
                condition: operation.condition,
            })
            .collect();
        let commands = operations.iter().map(|operation| Command {
            key: &operation.key,
            op: match operation.kind {
                Kind::Get => Op::Get {
                    version: true,
                    effects: None,
                },
                Kind::Put => Op::Put(Put {
                    flags: operation.flags,
                    deadline: operation.deadline,
                    ..Put::new(Value::Small(&operation.value))
                }),
                Kind::Delete => Op::Delete(Delete::default()),
            },
        });
        let commands: Vec<Command<'_>> = commands.collect();
        let txn = Transaction {
            checks: &checks,
            success: &commands,
            failure: &[],
        };
        let answer = self.calls.transact(&txn).await;
        match answer.end {
            TxnEnd::Success => Ok(answer.answers),
            TxnEnd::Failure => Err(failed()),
            TxnEnd::OutOfMemory => Err(no_memory()),
            TxnEnd::ReadOnly => Err(read_only()),
            TxnEnd::NotDurable => Err(self.not_durable()),
            TxnEnd::TooLarge => {
                let detail = "the values are too large for one response";
                Err(Problem::new(StatusCode::PAYLOAD_TOO_LARGE, detail))
            }
        }
    }
}

fn show(kind: Kind, answer: &Answer) -> Shown<'_> {
    let status = match (answer.outcome, kind) {
        (Outcome::Done, Kind::Get) => StatusCode::OK,
        (Outcome::Done, Kind::Put) if answer.created => StatusCode::CREATED,
        (Outcome::Done, _) => StatusCode::NO_CONTENT,
        _ => StatusCode::NOT_FOUND,
    };
    let item = (status == StatusCode::OK).then(|| Found {
        value: TextualValue::new(&answer.value),
        flags: answer.flags,
        expires_at_ms: match answer.deadline {
            Deadline::Never => None,
            Deadline::At(moment) => Some(moment.0),
        },
        etag: tag(answer.version),
    });
    Shown {
        status: status.as_u16(),
        item,
    }
}
