//! Hot keys and the slow log as tables, of the rows that `stats hotkeys` and `stats slowlog` answer.

use crate::protobuf::readable;
use std::collections::{BTreeMap, HashMap};

/// What one entry says, by name.
type Entry<'a> = HashMap<&'a str, &'a str>;

/// The entries of rows `<core>:<rank>:<what> <value>`, in the order of cores and ranks.
fn entries(rows: &[Vec<String>]) -> Vec<(u32, Entry<'_>)> {
    let mut found: BTreeMap<(u32, u32), Entry<'_>> = BTreeMap::new();
    for row in rows {
        let [name, value] = row.as_slice() else { continue };
        let mut parts = name.splitn(3, ':');
        let mut number = || parts.next()?.parse().ok();
        if let (Some(core), Some(rank), Some(what)) = (number(), number(), parts.next()) {
            found.entry((core, rank)).or_default().insert(what, value);
        }
    }
    found.into_iter().map(|((core, _), entry)| (core, entry)).collect()
}

fn text(entry: &Entry<'_>, what: &str) -> String {
    entry.get(what).copied().unwrap_or("-").to_owned()
}

fn number(entry: &Entry<'_>, what: &str) -> u64 {
    entry.get(what).and_then(|value| value.parse().ok()).unwrap_or(0)
}

fn percent(entry: &Entry<'_>, what: &str) -> String {
    let share: f64 = entry.get(what).and_then(|value| value.parse().ok()).unwrap_or(0.0);
    format!("{:.2}%", share * 100.0)
}

/// Of all cores, hottest first.
pub(crate) fn hot_keys(rows: &[Vec<String>]) -> Vec<Vec<String>> {
    let mut entries = entries(rows);
    entries.sort_by_key(|(_, entry)| std::cmp::Reverse(number(entry, "per_second")));
    let heads = ["key", "core", "per second", "writes", "of its core", "+-"];
    let rows = entries.iter().map(|(core, entry)| {
        vec![
            text(entry, "key"),
            core.to_string(),
            text(entry, "per_second"),
            text(entry, "writes_per_second"),
            percent(entry, "share"),
            percent(entry, "share_error"),
        ]
    });
    std::iter::once(heads.map(str::to_owned).to_vec()).chain(rows).collect()
}

/// Of all cores, newest first; how long ago by the clock of this machine.
pub(crate) fn slow_log(rows: &[Vec<String>], now_ms: u64) -> Vec<Vec<String>> {
    let mut entries = entries(rows);
    entries.sort_by_key(|(_, entry)| std::cmp::Reverse(number(entry, "at_ms")));
    let heads = [
        "key", "command", "requests", "ago", "total", "queue", "execute", "hop", "flush", "core", "protocol", "client",
    ];
    let rows = entries.iter().map(|(core, entry)| {
        let shown = entry.get("key").map_or(0, |key| key.len());
        let is_cut = number(entry, "key_bytes") > shown as u64;
        let ago_s = now_ms.saturating_sub(number(entry, "at_ms")) / 1000;
        let mut cells = vec![
            text(entry, "key") + if is_cut { "..." } else { "" },
            text(entry, "command"),
            text(entry, "requests"),
            format!("{ago_s}s"),
        ];
        let times = ["total_us", "queue_us", "execute_us", "hop_us", "flush_us"];
        cells.extend(times.map(|what| readable(number(entry, what).saturating_mul(1000))));
        cells.extend([core.to_string(), text(entry, "protocol"), text(entry, "client")]);
        cells
    });
    std::iter::once(heads.map(str::to_owned).to_vec()).chain(rows).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(lines: &[&str]) -> Vec<Vec<String>> {
        let row = |line: &&str| line.splitn(2, ' ').map(str::to_owned).collect();
        lines.iter().map(row).collect()
    }

    #[test]
    fn hot_keys_of_all_cores_are_one_list() {
        let answer = rows(&[
            "0:1:key a",
            "0:1:per_second 10",
            "0:1:writes_per_second 1",
            "0:1:share 0.5000",
            "0:1:share_error 0.0120",
            "1:1:key b%20c",
            "1:1:per_second 900",
            "1:1:writes_per_second 0",
            "1:1:share 0.0300",
            "1:1:share_error 0.0010",
        ]);
        let table = hot_keys(&answer);
        assert_eq!(table[1], ["b%20c", "1", "900", "0", "3.00%", "0.10%"]);
        assert_eq!(table[2], ["a", "0", "10", "1", "50.00%", "1.20%"]);
        assert_eq!((table.len(), hot_keys(&[]).len()), (3, 1));
    }

    #[test]
    fn the_newest_slow_request_stands_first() {
        let answer = rows(&[
            "0:1:at_ms 5000",
            "0:1:command other",
            "0:1:requests 1",
            "1:1:at_ms 6000",
            "1:1:protocol memcached",
            "1:1:client 127.0.0.1:9",
            "1:1:command get",
            "1:1:key long",
            "1:1:key_bytes 40",
            "1:1:requests 3",
            "1:1:total_us 31000",
            "1:1:queue_us 0",
            "1:1:execute_us 1000",
            "1:1:hop_us 30000",
            "1:1:flush_us 0",
        ]);
        let table = slow_log(&answer, 16_500);
        let newest = [
            "long...",
            "get",
            "3",
            "10s",
            "31.0ms",
            "0ns",
            "1.00ms",
            "30.0ms",
            "0ns",
            "1",
            "memcached",
            "127.0.0.1:9",
        ];
        assert_eq!(table[1], newest);
        assert_eq!((table[2][0].as_str(), table[2][3].as_str()), ("-", "11s"));
    }
}
