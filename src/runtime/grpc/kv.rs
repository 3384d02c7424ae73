//! The methods of `memkv.KV`: messages become commands and transactions, and what came of those becomes messages.

use super::codec::too_many_keys;
use crate::config::Limits;
use crate::model::{
    Check, Command, Condition, Deadline, Delete, LARGE_VALUE_BYTES, NewVersion, Op, Put, Transaction, TxnEnd,
    UnixMillis, Value, Version,
};
use crate::proto::{self, Code, condition::Is, entry::Expiry, operation::Operation as Kind};
use crate::protocol::call::{Answer, Outcome, Text, TxnAnswer};
use crate::protocol::{NO_LOG, NOT_DURABLE, READ_ONLY, is_text};
use crate::runtime::calls::Calls;
use prost::Message;
use tonic::Status;

pub(super) async fn get(calls: &Calls, request: proto::GetRequest) -> Result<proto::GetResponse, Status> {
    let key = checked_key(&request.key, None, &calls.config().limits)?;
    let op = read(request.with_version);
    let answer = calls.execute(&Command { key, op }).await;
    done(calls, &answer)?;
    Ok(get_response(answer))
}

pub(super) async fn put(calls: &Calls, entry: proto::Entry) -> Result<proto::PutResponse, Status> {
    let command = write(&entry, None, calls)?;
    let answer = match command.op {
        Op::Put(put) if entry.value.len() >= LARGE_VALUE_BYTES => {
            let upload = calls.announce(command.key, put, entry.value.len());
            match upload.refused() {
                Some(answer) => answer,
                None => {
                    upload.send(&entry.value);
                    upload.finish().await
                }
            }
        }
        _ => calls.execute(&command).await,
    };
    done(calls, &answer)?;
    if answer.outcome == Outcome::NotFound {
        // A write finds that there is no item only where its condition wants one.
        return Err(condition_failed(None));
    }
    Ok(put_response(answer))
}

pub(super) async fn delete(calls: &Calls, request: proto::DeleteRequest) -> Result<proto::DeleteResponse, Status> {
    let key = checked_key(&request.key, None, &calls.config().limits)?;
    let condition = condition(request.condition.as_ref(), None)?;
    if condition == Condition::Absent {
        return Err(Status::invalid_argument("a delete cannot have its key absent"));
    }
    let op = Op::Delete(Delete {
        condition,
        ..Delete::default()
    });
    let answer = calls.execute(&Command { key, op }).await;
    done(calls, &answer)?;
    let deleted = answer.outcome == Outcome::Done;
    if !deleted && condition != Condition::Always {
        return Err(condition_failed(None));
    }
    Ok(proto::DeleteResponse { deleted })
}

pub(super) async fn batch_get(
    calls: &Calls,
    request: proto::BatchGetRequest,
) -> Result<proto::BatchGetResponse, Status> {
    let config = calls.config();
    check_count(request.keys.len(), &config.limits)?;
    let commands = request.keys.iter().enumerate().map(|(index, key)| {
        let key = checked_key(key, Some(index + 1), &config.limits)?;
        let op = read(request.with_version);
        Ok(Command { key, op })
    });
    let commands: Vec<Command<'_>> = commands.collect::<Result<_, Status>>()?;
    let answer = together(calls, &[], &commands, &[]).await?;
    let results = answer.answers.into_iter().map(get_response).collect();
    Ok(proto::BatchGetResponse { results })
}

pub(super) async fn batch_put(
    calls: &Calls,
    request: proto::BatchPutRequest,
) -> Result<proto::BatchPutResponse, Status> {
    check_count(request.entries.len(), &calls.config().limits)?;
    let (mut checks, mut numbers) = (vec![], vec![]);
    let commands = request.entries.iter().enumerate().map(|(index, entry)| {
        let number = index + 1;
        let mut command = write(entry, Some(number), calls)?;
        let condition = take_condition(&mut command);
        if condition != Condition::Always {
            let key = command.key;
            checks.push(Check { key, condition });
            numbers.push(number);
        }
        Ok(command)
    });
    let commands: Vec<Command<'_>> = commands.collect::<Result<_, Status>>()?;
    let answer = together(calls, &checks, &commands, &[]).await?;
    if answer.end == TxnEnd::Failure {
        let failed = answer.checks.iter().position(|held| !held);
        return Err(condition_failed(failed.and_then(|index| numbers.get(index)).copied()));
    }
    let results = answer.answers.into_iter().map(put_response).collect();
    Ok(proto::BatchPutResponse { results })
}

pub(super) async fn txn(calls: &Calls, request: proto::Txn) -> Result<proto::TxnResponse, Status> {
    let config = calls.config();
    let compared = request.compare.len();
    let for_success = compared + request.success.len();
    check_count(for_success + request.failure.len(), &config.limits)?;
    let checks = request.compare.iter().enumerate().map(|(index, compare)| {
        let number = Some(index + 1);
        let key = checked_key(&compare.key, number, &config.limits)?;
        let condition = condition(compare.condition.as_ref(), number)?;
        Ok(Check { key, condition })
    });
    let checks: Vec<Check<'_>> = checks.collect::<Result<_, Status>>()?;
    let operations = |operations, before| -> Result<Vec<Command<'_>>, Status> {
        let numbered = <[proto::Operation]>::iter(operations).enumerate();
        numbered
            .map(|(index, one)| operation(one, before + index + 1, calls))
            .collect()
    };
    let success = operations(&request.success, compared)?;
    let failure = operations(&request.failure, for_success)?;
    let answer = together(calls, &checks, &success, &failure).await?;
    let results = answer.answers.into_iter().map(|answer| proto::KeyResult {
        code: match answer.outcome {
            Outcome::NotFound => Code::NotFound.into(),
            _ => Code::Ok.into(),
        },
        expires_at_ms: expires_at_ms(answer.deadline),
        value: answer.value,
        flags: answer.flags,
        version: answer.version.0,
    });
    Ok(proto::TxnResponse {
        succeeded: answer.end == TxnEnd::Success,
        results: results.collect(),
    })
}

pub(super) async fn metrics(calls: &Calls, _: proto::Metrics) -> Result<proto::MetricsReport, Status> {
    let report = calls.text(Text::Protobuf).await;
    let unreadable = |error| Status::internal(format!("the report cannot be read: {error}"));
    proto::MetricsReport::decode(report.as_slice()).map_err(unreadable)
}

/// Executes commands at one instant. What is answered is how they ended, unless that is with an error.
async fn together(
    calls: &Calls,
    checks: &[Check<'_>],
    success: &[Command<'_>],
    failure: &[Command<'_>],
) -> Result<TxnAnswer, Status> {
    let txn = Transaction {
        checks,
        success,
        failure,
    };
    let answer = calls.transact(&txn).await;
    match answer.end {
        TxnEnd::Success | TxnEnd::Failure => Ok(answer),
        TxnEnd::OutOfMemory => Err(out_of_memory()),
        TxnEnd::TooLarge => Err(Status::resource_exhausted(
            "the values are too large together for one answer",
        )),
        TxnEnd::ReadOnly => Err(read_only()),
        TxnEnd::NotDurable => Err(not_durable(calls)),
    }
}

/// What an answer says, when it is an error whatever was asked.
fn done(calls: &Calls, answer: &Answer) -> Result<(), Status> {
    match answer.outcome {
        Outcome::Done | Outcome::NotFound => Ok(()),
        Outcome::ConditionFailed => Err(condition_failed(None)),
        Outcome::OutOfMemory => Err(out_of_memory()),
        Outcome::TooLarge => Err(Status::resource_exhausted("the result is too large")),
        Outcome::ReadOnly => Err(read_only()),
        Outcome::NotDurable => Err(not_durable(calls)),
    }
}

fn read_only() -> Status {
    Status::failed_precondition(READ_ONLY)
}

fn not_durable(calls: &Calls) -> Status {
    match calls.has_log() {
        true => Status::unknown(NOT_DURABLE),
        // Only who has asked for it is told so, and nothing was done.
        false => Status::failed_precondition(NO_LOG),
    }
}

fn out_of_memory() -> Status {
    Status::resource_exhausted("the server's memory limit is reached: nothing was changed")
}

fn condition_failed(entry: Option<usize>) -> Status {
    Status::aborted(match entry {
        Some(number) => format!("the condition of entry {number} does not hold: nothing was changed"),
        None => "the condition does not hold: nothing was changed".to_owned(),
    })
}

fn get_response(answer: Answer) -> proto::GetResponse {
    proto::GetResponse {
        found: answer.outcome == Outcome::Done,
        expires_at_ms: expires_at_ms(answer.deadline),
        value: answer.value,
        flags: answer.flags,
        version: answer.version.0,
    }
}

fn put_response(answer: Answer) -> proto::PutResponse {
    proto::PutResponse {
        created: answer.created,
        version: answer.version.0,
    }
}

fn expires_at_ms(deadline: Deadline) -> u64 {
    match deadline {
        Deadline::Never => 0,
        Deadline::At(moment) => moment.0,
    }
}

fn check_count(keys: usize, limits: &Limits) -> Result<(), Status> {
    let keys_max = limits.request_keys_max as usize;
    match keys {
        0 => Err(Status::invalid_argument("no key")),
        _ if keys > keys_max => Err(too_many_keys(keys_max)),
        _ => Ok(()),
    }
}

/// "the key", or which one of many.
fn named(what: &str, number: Option<usize>) -> String {
    number.map_or_else(|| format!("the {what}"), |number| format!("{what} {number}"))
}

fn checked_key<'a>(key: &'a [u8], number: Option<usize>, limits: &Limits) -> Result<&'a [u8], Status> {
    let (length, most) = (key.len(), usize::from(limits.key_size_max));
    if (1..=most).contains(&length) {
        return Ok(key);
    }
    let key = named("key", number);
    Err(Status::invalid_argument(match length {
        0 => format!("{key} is empty"),
        _ => format!("{key} has {length} bytes, and the most is {most}"),
    }))
}

fn read(version: bool) -> Op<'static> {
    let effects = None;
    Op::Get { version, effects }
}

/// The command of an entry.
fn write<'a>(entry: &'a proto::Entry, number: Option<usize>, calls: &Calls) -> Result<Command<'a>, Status> {
    let limits = &calls.config().limits;
    let key = checked_key(&entry.key, number, limits)?;
    let (length, most) = (entry.value.len(), limits.item_size_max);
    if length as u64 > most.0 {
        let value = named("value", number);
        let reason = format!("{value} has {length} bytes, and the most is {}", most.0);
        return Err(Status::resource_exhausted(reason));
    }
    let deadline = match entry.expiry {
        None | Some(Expiry::TtlMs(0) | Expiry::ExpiresAtMs(0)) => Deadline::Never,
        Some(Expiry::TtlMs(ttl_ms)) => Deadline::At(UnixMillis(calls.now().0.saturating_add(ttl_ms))),
        Some(Expiry::ExpiresAtMs(moment)) => Deadline::At(UnixMillis(moment)),
    };
    let put = Put {
        flags: entry.flags,
        deadline,
        condition: condition(entry.condition.as_ref(), number)?,
        version: match entry.with_version {
            true => NewVersion::Now,
            false => NewVersion::OnDemand,
        },
        key_encoded: !is_text(key),
        ..Put::new(Value::collected(&entry.value))
    };
    let op = Op::Put(put);
    Ok(Command { key, op })
}

/// The command of a transaction's operation, the one with this number among all that the request has.
fn operation<'a>(operation: &'a proto::Operation, number: usize, calls: &Calls) -> Result<Command<'a>, Status> {
    let key = |key: &'a Vec<u8>| checked_key(key, Some(number), &calls.config().limits);
    let mut command = match &operation.operation {
        Some(Kind::Get(bytes)) => Command {
            key: key(bytes)?,
            op: read(operation.with_version),
        },
        Some(Kind::Set(entry)) => write(entry, Some(number), calls)?,
        Some(Kind::Delete(bytes)) => Command {
            key: key(bytes)?,
            op: Op::Delete(Delete::default()),
        },
        None => {
            let reason = format!("operation {number} is none that this server knows");
            return Err(Status::invalid_argument(reason));
        }
    };
    if take_condition(&mut command) != Condition::Always {
        let reason = format!("operation {number} has a condition: it belongs to compare");
        return Err(Status::invalid_argument(reason));
    }
    Ok(command)
}

/// Takes away the condition of a write.
fn take_condition(command: &mut Command<'_>) -> Condition {
    match &mut command.op {
        Op::Put(put) => std::mem::take(&mut put.condition),
        _ => Condition::Always,
    }
}

/// A condition of a kind that is not known here comes without one: what depends on it must not be done in any case.
fn condition(condition: Option<&proto::Condition>, number: Option<usize>) -> Result<Condition, Status> {
    let Some(condition) = condition else {
        return Ok(Condition::Always);
    };
    match condition.is {
        Some(Is::Absent(false) | Is::Present(false)) => Ok(Condition::Always),
        Some(Is::Absent(true)) => Ok(Condition::Absent),
        Some(Is::Present(true)) => Ok(Condition::Present),
        Some(Is::Version(version)) => Ok(Condition::VersionIs(Version(version))),
        None => {
            let condition = named("condition", number);
            let reason = format!("{condition} is of no kind that this server knows");
            Err(Status::invalid_argument(reason))
        }
    }
}
