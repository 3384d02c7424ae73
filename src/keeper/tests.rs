use super::*;
use crate::disk::memory::MemoryDisk;
use crate::frame::SegmentHead;
use crate::wal::Chunk;

const SEGMENT: u64 = 64 << 10;

fn keeper(disk: &MemoryDisk) -> Keeper {
    let place = Place {
        disk: Arc::new(disk.clone()),
        name: "data".into(),
        seal: Seal::new(1),
        directory: 1,
        generation: 1,
        core: 0,
    };
    let head = SegmentHead {
        cores: 1,
        directory: 1,
        generation: 1,
        shards: 8,
        bytes: SEGMENT,
        ..SegmentHead::default()
    };
    create_segment(&place, &head, None).unwrap();
    Keeper::new(place, head, Box::new(|_| Ok(()))).unwrap()
}

fn unit(position: u64, bytes: usize, sync: bool) -> Job {
    let mut effects = vec![];
    while effects.len() < bytes {
        crate::effect::push_delete(&mut effects, &[7; 96]);
    }
    Job::Log {
        chunks: vec![Chunk {
            position,
            effects,
            ..Chunk::default()
        }],
        sync,
        ends: false,
    }
}

#[test]
fn a_job_costs_one_write_and_one_sync() {
    let disk = MemoryDisk::default();
    let mut keeper = keeper(&disk);
    let before = disk.writes_and_syncs();
    let done = keeper.run(unit(0, 30_000, true));
    assert!(matches!(done, Done::Logged { synced: true, .. }), "{done:?}");
    assert_eq!(disk.writes_and_syncs(), (before.0 + 1, before.1 + 1));
    // Nothing new: nothing to make safe.
    let nothing = Job::Log {
        chunks: vec![],
        sync: true,
        ends: false,
    };
    assert!(matches!(keeper.run(nothing), Done::Logged { synced: true, .. }));
    assert_eq!(disk.writes_and_syncs(), (before.0 + 1, before.1 + 1));
}

#[test]
fn after_a_failed_sync_the_log_takes_nothing_more() {
    let disk = MemoryDisk::default();
    let mut keeper = keeper(&disk);
    assert!(matches!(keeper.run(unit(0, 100, true)), Done::Logged { .. }));
    disk.fail_syncs_after(0);
    let Done::Failed { log: true, why } = keeper.run(unit(100, 100, true)) else {
        panic!("the sync failed");
    };
    assert!(
        why.contains("data/log/00000001-0000-00000000.log") && why.contains("input/output error"),
        "{why}"
    );
    disk.fail_syncs_after(u64::MAX);
    let before = disk.writes_and_syncs();
    assert!(matches!(
        keeper.run(unit(200, 100, true)),
        Done::Failed { log: true, .. }
    ));
    assert!(!keeper.idle());
    assert_eq!(disk.writes_and_syncs(), before);
}

#[test]
fn a_full_disk_is_told_with_the_file_and_the_cause() {
    let disk = MemoryDisk::default();
    let mut keeper = keeper(&disk);
    disk.limit_bytes(SEGMENT + 1000);
    let mut position = 0;
    let why = loop {
        match keeper.run(unit(position, 9700, true)) {
            Done::Logged { .. } => position += 9700,
            Done::Failed { log: true, why } => break why,
            other => panic!("{other:?}"),
        }
        // The next segment cannot be prepared: that is no reason to end before it is needed.
        while keeper.idle() {}
    };
    assert!(position > 40_000, "the first segment was full");
    assert!(why.contains("data/log/00000001-0000-00000001.log"), "{why}");
    assert!(why.contains("no space left") && why.contains("make room"), "{why}");
    // Nothing that takes room is left behind.
    assert_eq!(disk.paths(), ["log/00000001-0000-00000000.log"]);
    disk.limit_bytes(u64::MAX);
    let why = match keeper.run(Job::EndImage) {
        Done::Failed { log: false, why } => why,
        other => panic!("{other:?}"),
    };
    assert!(why.contains("no image"), "{why}");
}

#[test]
fn segments_are_used_again_and_only_a_few_wait() {
    let disk = MemoryDisk::default();
    let mut keeper = keeper(&disk);
    let mut position = 0;
    for _ in 0..80 {
        let job = unit(position, 9700, false);
        let Job::Log { chunks, .. } = &job else { unreachable!() };
        position += chunks[0].effects.len() as u64;
        assert!(matches!(keeper.run(job), Done::Logged { .. }));
    }
    assert!(disk.paths().len() > 10);
    let begin = Job::BeginImage {
        shard: 3,
        position,
        epoch: 1,
        time: Default::default(),
    };
    for job in [
        begin,
        Job::EndImage,
        Job::AdoptImage {
            log_needed_from: position,
        },
    ] {
        let done = keeper.run(job);
        assert!(matches!(done, Done::Image { .. }), "{done:?}");
    }
    let spares = || disk.paths().iter().filter(|path| path.contains("spare")).count();
    assert_eq!((disk.paths().len(), spares()), (6, 4));
    let next = unit(position, 60_000, false);
    assert!(matches!(keeper.run(next), Done::Logged { .. }));
    assert_eq!((disk.paths().len(), spares()), (6, 3));
    // An image that is given up leaves nothing.
    let begin = Job::BeginImage {
        shard: 4,
        position,
        epoch: 1,
        time: Default::default(),
    };
    assert!(matches!(keeper.run(begin), Done::Image { .. }));
    assert_eq!(disk.paths().len(), 7);
    assert!(matches!(keeper.run(Job::DropImage), Done::Image { .. }));
    assert_eq!(disk.paths().len(), 6);
}
