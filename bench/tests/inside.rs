//! The engine inside the test, as the program measures it. What is measured is not judged, only that it is told.

// In a test, an unwrap is the assertion.
#![allow(clippy::unwrap_used)]

use clap::Parser;
use memkv_bench::inside::growth::{self, Growth};
use memkv_bench::inside::hit_ratio::{self, HitRatio};
use memkv_bench::inside::lookup::{self, Lookup};
use std::process::Command;

/// The parameters of a measurement, as on a command line.
fn of<T: clap::Args>(options: &str) -> T {
    #[derive(Parser)]
    struct Line<T: clap::Args> {
        #[command(flatten)]
        config: T,
    }
    let words = options.split_whitespace();
    Line::<T>::parse_from(std::iter::once("test").chain(words)).config
}

fn silent(_: &str) {}

#[test]
fn growth_is_measured() {
    let config: Growth = of("--keys 30000 --step 10000 --value-size 0-5000");
    let mut said = Vec::new();
    let report = growth::run(&config, &mut |what| said.push(what.to_owned())).unwrap();
    assert!(report.p50_ns > 0 && report.p50_ns <= report.p99_9_ns && report.p99_9_ns <= report.max_ns);
    assert!(report.over_1ms_wall <= report.slow && report.over_1ms_cpu <= report.slow);
    assert_eq!(report.slowest_by_wall.len() as u64, report.slow.min(10));
    let items: Vec<u64> = report.steps.iter().map(|step| step.items / 1000).collect();
    assert_eq!(items, [10, 20, 30]);
    assert_eq!(report.steps.iter().map(|step| step.slow).sum::<u64>(), report.slow);
    assert_eq!(said.len(), 3);
    let last = report.steps.last().unwrap();
    let bytes = last.charged_bytes / last.items;
    assert!((2500..4000).contains(&bytes), "{bytes} of 2,519 on average");
    let text = report.text();
    assert!(
        text.contains("30,000 keys of 19 bytes") && text.contains("by CPU time"),
        "{text}"
    );
}

#[test]
fn growth_keeps_a_rate() {
    let config: Growth = of("--keys 500 --rate 10000");
    let report = growth::run(&config, &mut silent).unwrap();
    assert!(report.elapsed_s >= 0.0499, "{}", report.elapsed_s);
    for (options, words) in [
        ("--rate 0", "--rate"),
        ("--step 0", "--step"),
        ("--key-size 3", "--key-size 3"),
    ] {
        let message = growth::run(&of(options), &mut silent).unwrap_err();
        assert!(message.contains(words), "{message}");
    }
}

#[test]
fn lookups_are_measured() {
    let config: Lookup = of("--keys 2000,100,2000 --pipelines 1,7 --apart --count 1000 --rounds 2 --value-size 0-300");
    let report = lookup::run(&config, &mut silent).unwrap();
    let rows: Vec<_> = report
        .rows
        .iter()
        .map(|row| (row.keys, row.pipeline, row.apart))
        .collect();
    let expected = [
        (100, 1, false),
        (100, 7, false),
        (100, 7, true),
        (2000, 1, false),
        (2000, 7, false),
        (2000, 7, true),
    ];
    assert_eq!(rows, expected);
    assert!(report.rows.iter().all(|row| row.cpu_ns > 0.0 && row.wall_ns > 0.0));
    assert!(
        report
            .rows
            .iter()
            .all(|row| row.by_apart.is_some() == (row.pipeline > 1 && !row.apart))
    );
    assert!(report.text().contains("apart"), "{}", report.text());
    for (options, words) in [
        ("--keys 0", "1 to"),
        ("--keys 10 --pipelines 0", "--pipelines"),
        ("--keys 10 --rounds 0", "--rounds"),
        ("--keys 4000000000 --value-size 1000000", "are free"),
    ] {
        let message = lookup::run(&of(options), &mut silent).unwrap_err();
        assert!(message.contains(words), "{message}");
    }
}

#[test]
fn hit_ratios_are_measured() {
    let config: HitRatio = of("--keys 10000 --requests 30000 --scan-length 500 --share 0.3");
    let report = hit_ratio::run(&config, &mut silent).unwrap();
    assert_eq!(report.workloads.len(), 4);
    for workload in &report.workloads {
        let text = report.text();
        assert_eq!(workload.engine.counted.gets, 30000);
        assert_eq!(workload.roomy.refused, 0);
        assert!(
            workload.engine.items > 1000 && workload.engine.items < workload.roomy.items,
            "{text}"
        );
        assert!(
            workload.engine.charged_bytes <= workload.memory_bytes_max + (1 << 20),
            "{text}"
        );
        assert!(workload.engine.hit_ratio < workload.roomy.hit_ratio, "{text}");
        assert_eq!(workload.policies.len(), 6);
        let of = |name: &str| workload.policies.iter().find(|row| row.name == name).unwrap().hit_ratio;
        assert!(of("S3-FIFO") > of("FIFO"), "{text}");
        assert!(of("LRU") > of("random"), "{text}");
        let in_bytes = workload.workload.starts_with("mixed");
        assert_eq!(workload.capacity_in_bytes, in_bytes);
        let (scans, counted) = (workload.workload.starts_with("scan"), workload.engine.counted);
        assert_eq!(counted.popular_gets < counted.gets, scans, "{text}");
    }
    for (options, words) in [
        ("--requests 0", "--requests"),
        ("--keys 0", "--keys"),
        ("--share 0", "--share"),
        ("--scan-share 1", "--scan-share"),
    ] {
        let message = hit_ratio::run(&of(options), &mut silent).unwrap_err();
        assert!(message.contains(words), "{message}");
    }
}

/// With room for all there is nothing to decide: the engine and the policies find the same.
#[test]
fn with_room_for_all_policies_agree() {
    let config: HitRatio = of("--workloads zipf --keys 3000 --requests 20000 --warmup 0 --share 1 --pipeline 1");
    let report = hit_ratio::run(&config, &mut silent).unwrap();
    let workload = &report.workloads[0];
    assert_eq!(workload.engine.items, workload.roomy.items, "{}", report.text());
    for row in &workload.policies {
        assert_eq!(row.counted, workload.engine.counted, "{}", row.name);
    }
}

#[test]
fn the_program_measures_the_engine() {
    let program = |options: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_memkv-bench"))
            .args(options.split_whitespace())
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    for (options, field) in [
        ("engine growth --keys 3000", "p99_99_ns"),
        ("engine lookup --keys 100,1000 --count 500 --rounds 1", "rows"),
        (
            "engine hit-ratio --keys 1000 --requests 3000 --workloads zipf:0.7",
            "workloads",
        ),
    ] {
        let (code, out, err) = program(options);
        assert_eq!((code, err.as_str()), (Some(0), ""), "{options}");
        assert!(out.contains("keys"), "{out}");
        let (code, out, _) = program(&format!("{options} --json"));
        assert_eq!(code, Some(0), "{options}");
        let json: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert!(!json[field].is_null(), "{out}");
    }
    let (code, _, err) = program("engine growth --keys 10 --cpu 4000");
    assert!(code == Some(1) && err.contains("--cpu"), "{err}");
    let (code, _, err) = program("compare --memory --with memcached --pipelines 1");
    assert!(code == Some(1) && err.contains("--memory"), "{err}");
}
