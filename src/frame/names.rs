//! The names of the files.

/// A segment of the log: `log/GGGGGGGG-CCCC-SSSSSSSS.log`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SegmentName {
    /// The run of the server.
    pub generation: u32,
    /// The core.
    pub core: u16,
    /// The number of the segment.
    pub number: u64,
}

/// An image: `images/SSSSS-GGGGGGGG-PPPPPPPPPPPPPPPP.image`. In order, the last one of a shard is the newest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ImageName {
    /// The shard.
    pub shard: u16,
    /// The run of the server.
    pub generation: u32,
    /// The position in the log of the core that had it.
    pub position: u64,
}

impl SegmentName {
    /// With its folder.
    pub fn path(&self) -> String {
        let Self {
            generation,
            core,
            number,
        } = self;
        format!("log/{generation:08}-{core:04}-{number:08}.log")
    }

    /// From a name without its folder.
    pub fn parse(name: &str) -> Option<Self> {
        let mut parts = name.strip_suffix(".log")?.split('-');
        let found = Self {
            generation: parts.next()?.parse().ok()?,
            core: parts.next()?.parse().ok()?,
            number: parts.next()?.parse().ok()?,
        };
        // Nothing else is taken for one that this program wrote.
        (found.path().strip_prefix("log/") == Some(name)).then_some(found)
    }
}

impl ImageName {
    /// With its folder.
    pub fn path(&self) -> String {
        let Self {
            shard,
            generation,
            position,
        } = self;
        format!("images/{shard:05}-{generation:08}-{position:016}.image")
    }

    /// From a name without its folder.
    pub fn parse(name: &str) -> Option<Self> {
        let mut parts = name.strip_suffix(".image")?.split('-');
        let found = Self {
            shard: parts.next()?.parse().ok()?,
            generation: parts.next()?.parse().ok()?,
            position: parts.next()?.parse().ok()?,
        };
        (found.path().strip_prefix("images/") == Some(name)).then_some(found)
    }
}

/// A segment that waits to be used: `log/spare-CCCC-N.log`.
pub fn spare_name(core: u16, number: usize) -> String {
    format!("log/spare-{core:04}-{number}.log")
}

/// The core and the number, from a name without its folder.
pub fn spare_parts(name: &str) -> Option<(u16, usize)> {
    let (core, number) = name.strip_prefix("spare-")?.strip_suffix(".log")?.split_once('-')?;
    Some((core.parse().ok()?, number.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back() {
        let segment = SegmentName {
            generation: 3,
            core: 12,
            number: 123_456_789,
        };
        assert_eq!(segment.path(), "log/00000003-0012-123456789.log");
        assert_eq!(SegmentName::parse("00000003-0012-123456789.log"), Some(segment));
        let image = ImageName {
            shard: 7,
            generation: 2,
            position: 99,
        };
        assert_eq!(image.path(), "images/00007-00000002-0000000000000099.image");
        assert_eq!(ImageName::parse("00007-00000002-0000000000000099.image"), Some(image));
        assert_eq!(spare_parts("spare-0002-1.log"), Some((2, 1)));
        for other in [
            "3-12-1.log",
            "00000003-0012-00000001.log.new",
            "x.log",
            "spare-0001-0.log",
        ] {
            assert_eq!(SegmentName::parse(other), None);
        }
        assert_eq!(ImageName::parse("00007-00000002-0000000000000099.image.new"), None);
    }
}
