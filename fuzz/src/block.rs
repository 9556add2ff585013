//! A disk device and a driver that keeps to the rules mostly, and breaks them now and then.
//!
//! Requests that keep to the rules are to be answered, and what they wrote is to be read back. Requests that break them are to be given
//! back. A ring that breaks them may stop its own queue, until the device is reset; the others go on.

mod driver;

use std::collections::HashMap;
use std::sync::Arc;

use devices::virtio::block::{Block, BlockControl, BlockOptions, Engine};
use vm_memory::VolatileSlice;
use vmfs_image::fuzzing::forge;
use vmfs_image::{Format, Image, OpenOptions};

use crate::image::file;
use crate::input::Input;
use driver::{Driver, Piece, QUEUES, SLOTS};

/// Sectors of the disk.
const SECTORS: u64 = 0x6000;
/// Requests that keep to the rules name these; those that break them name others, and have no bytes that would make these by mistake.
const KNOWN: std::ops::Range<u64> = 0x4a80..0x4b80;
const SERIAL: &str = "fuzz";

/// What a request that is under way is to come to.
#[derive(Debug)]
enum Wanted {
    /// It is given back, whatever it came to.
    Back,
    /// Status and bytes written.
    Answer(u8, u32),
    /// These sectors are read.
    Read(u64, u64),
}

/// What a sector holds: a number, repeated; perhaps zeroes instead.
#[derive(Debug, Clone, Copy, Default)]
struct Sector {
    value: u32,
    maybe_zero: bool,
}

struct Session {
    driver: Driver,
    control: BlockControl,
    readonly: bool,
    sectors: HashMap<u64, Sector>,
    wanted: Vec<HashMap<u16, Wanted>>,
    /// Known sectors that requests under way touch, and whether they change them.
    busy: Vec<(u64, u64, bool)>,
    /// Queues whose rings were broken.
    wild: Vec<bool>,
    value: u32,
}

/// Makes a disk and a driver, and does what the input says.
pub fn drive(input: &mut Input<'_>) {
    let thin = input.one_in(3);
    let path = file("disk", &if thin { forge::empty(SECTORS * 512, 16, 0) } else { Vec::new() });
    if !thin {
        let disk = std::fs::File::options().write(true).open(&path).expect("the file is there");
        disk.set_len(SECTORS * 512).expect("/dev/shm has space");
    }
    let format = if thin { Format::Thin } else { Format::Flat };
    let readonly = input.one_in(12);
    let how = OpenOptions { writable: !readonly, format: Some(format), ..OpenOptions::default() };
    let image = vmfs_image::open(&path, &how).expect("a sound image opens");
    let options = BlockOptions {
        serial: SERIAL.to_owned(),
        readonly,
        queues: QUEUES,
        engine: input.one_of(&[Engine::Auto, Engine::Plain]),
        ..BlockOptions::default()
    };
    let (block, control) = Block::new(image.clone(), options);
    let mut session = Session {
        driver: Driver::new(Box::new(block)),
        control,
        readonly,
        sectors: HashMap::new(),
        wanted: (0..QUEUES).map(|_| HashMap::new()).collect(),
        busy: Vec::new(),
        wild: vec![false; usize::from(QUEUES)],
        value: 0,
    };
    session.driver.start(feature_mask(input));
    for _ in 0..80 {
        if input.is_empty() {
            break;
        }
        session.step(input, &image);
        assert_eq!((image.size(), session.driver.capacity()), (SECTORS * 512, SECTORS));
    }
    session.settle();
    session.restart(&image, u64::MAX);
    // Whatever has happened, it serves a driver that begins anew and keeps to the rules.
    session.ask(0, 0, KNOWN.start, 8, &mut Input(&[]));
    session.ask(1, 4, 0, 0, &mut Input(&[]));
    session.settle();
    session.driver.device.reset();
    session.compare(&image);
    drop(session);
    drop(image);
    if thin {
        let report = vmfs_image::thin::check::check(&path, false).expect("the image is checked");
        assert_eq!(report.errors, Vec::<String>::new());
    }
}

/// Features that the driver leaves out: event index, indirect descriptors, flush.
fn feature_mask(input: &mut Input<'_>) -> u64 {
    let without = [0, 0, 1 << 29, 1 << 28, 1 << 9, 1 << 29 | 1 << 28];
    !input.one_of(&without)
}

impl Session {
    fn step(&mut self, input: &mut Input<'_>, image: &Arc<dyn Image>) {
        let queue = u16::try_from(input.below(QUEUES.into())).unwrap_or(0);
        match input.below(24) {
            0..14 => {
                let kind = u32::try_from(input.one_of(&[0, 0, 0, 1, 1, 1, 4, 8, 11, 13])).unwrap_or(0);
                let (sector, count) = (KNOWN.start + input.below(0x100), 1 + input.below(24));
                self.ask(queue, kind, sector, count.min(KNOWN.end - sector), input);
            }
            14..17 => self.ask_wrongly(queue, input),
            17 => self.driver.kick(queue, input.one_in(2)),
            18 => self.settle(),
            19 => {
                self.driver.device.pause();
                self.driver.kick(queue, false);
                self.driver.device.resume();
            }
            20 => {
                self.control.drain();
                self.driver.kick(queue, false);
                self.control.resume();
            }
            21 => {
                let old = self.control.swap(self.control.image()).expect("the same image is as good");
                assert_eq!(old.size(), image.size());
            }
            22 => {
                self.settle();
                let features = feature_mask(input);
                self.restart(image, features);
            }
            _ => {
                // What is in the rings is the driver's affair no more.
                self.settle();
                self.wild[usize::from(queue)] = true;
                self.driver.scribble(queue, input);
            }
        }
    }

    /// Whether nothing is known of the disk any more: a queue whose rings are broken may hold any request.
    fn is_wild(&self) -> bool {
        self.wild.contains(&true)
    }

    /// Makes a request that keeps to the rules.
    fn ask(&mut self, queue: u16, kind: u32, sector: u64, count: u64, input: &mut Input<'_>) {
        if self.wild[usize::from(queue)] {
            return;
        }
        let changes = matches!(kind, 1 | 11 | 13);
        let moves = changes || kind == 0;
        let meets = |&(from, to, changed): &(u64, u64, bool)| {
            from < sector + count && sector < to && (changed || changes)
        };
        if moves && self.busy.iter().any(meets) {
            self.settle();
        }
        let Some(slot) = self.driver.slot(queue, SLOTS) else {
            self.settle();
            return;
        };
        let mut header = [u64::from(kind).to_le_bytes(), sector.to_le_bytes()].concat();
        let mut pieces = Vec::new();
        let mut room = 0;
        match kind {
            0 => room = count * 512,
            1 => {
                self.value += 1;
                for at in sector..sector + count {
                    header.extend(self.pattern(at).to_le_bytes().repeat(128));
                }
            }
            8 => room = 20,
            11 | 13 => {
                let unmap = u32::from(kind == 13 && input.one_in(2));
                let sectors = u32::try_from(count).unwrap_or(0);
                header.extend(sector.to_le_bytes());
                header.extend([sectors.to_le_bytes(), unmap.to_le_bytes()].concat());
            }
            _ => header[8..16].fill(0),
        }
        if kind != 0 && kind != 1 {
            header[8..16].fill(0);
        }
        pieces.extend(cut(header.len() as u64, 16, input).map(Piece::Read));
        pieces.extend(cut(room, room.max(1), input).map(Piece::Write));
        pieces.push(Piece::Write(1));
        self.driver.make(queue, slot, &header, &pieces, input.one_in(3));
        let wanted = match kind {
            _ if self.readonly && changes => Wanted::Answer(1, 1),
            0 => Wanted::Read(sector, count),
            8 => Wanted::Answer(0, 21),
            _ => Wanted::Answer(0, 1),
        };
        if moves {
            self.busy.push((sector, sector + count, changes));
        }
        if !self.readonly {
            for at in sector..sector + count {
                let pattern = self.pattern(at);
                let sector = self.sectors.entry(at).or_default();
                match kind {
                    1 => *sector = Sector { value: pattern, maybe_zero: false },
                    11 => sector.maybe_zero = true,
                    13 => *sector = Sector::default(),
                    _ => {}
                }
            }
        }
        self.wanted[usize::from(queue)].insert(slot, wanted);
        self.driver.offer(queue, slot);
        if !input.one_in(4) {
            self.driver.kick(queue, true);
        }
    }

    fn pattern(&self, sector: u64) -> u32 {
        self.value << 12 | u32::try_from(sector).unwrap_or(0)
    }

    /// Makes a request that breaks a rule, but leaves the rings whole.
    fn ask_wrongly(&mut self, queue: u16, input: &mut Input<'_>) {
        if self.wild[usize::from(queue)] {
            return;
        }
        let Some(slot) = self.driver.slot(queue, SLOTS) else {
            self.settle();
            return;
        };
        let kind: u64 = input.one_of(&[0, 0, 1, 1, 4, 8, 11, 13, 2, 14, 16, 0xffff_ffff]);
        let far =
            [0, 0, 255, SECTORS - 1, SECTORS, SECTORS + 1, 1 << 55, u64::MAX >> 9, u64::MAX, u64::MAX - 7];
        let sector = input.one_of(&far);
        let mut bytes = [kind.to_le_bytes(), sector.to_le_bytes()].concat();
        for _ in 0..input.below(4) {
            let count = match input.interesting(&[1, 8, 8191, 8192, 1 << 22]) & 0xffff_ffff {
                // Not on to those that are known.
                0x4000..SECTORS => SECTORS + 1,
                count => count,
            };
            let flags = input.one_of(&[0, 0, 1, 2, u64::MAX]);
            bytes.extend(input.one_of(&far).to_le_bytes());
            bytes.extend((count | flags << 32).to_le_bytes());
        }
        let mut pieces: Vec<_> = cut(bytes.len() as u64, 16, input).map(Piece::Read).collect();
        let room = input.one_of(&[0, 1, 20, 511, 512, 1024, 4096, 12_288]);
        pieces.extend(cut(room, room.max(1), input).map(Piece::Write));
        if !input.one_in(4) {
            pieces.push(Piece::Write(1));
        }
        for _ in 0..input.below(3) {
            if pieces.is_empty() {
                break;
            }
            let at = usize::try_from(input.below(pieces.len() as u64)).unwrap_or(0);
            match input.below(6) {
                0 => drop(pieces.remove(at)),
                1 => pieces.swap(0, at),
                2 => {
                    pieces[at] = Piece::Outside(
                        input.below(8),
                        input.one_of(&[0, 1, 512, 1 << 31, u64::from(u32::MAX)]),
                    )
                }
                3 => pieces.insert(at, Piece::Read(0)),
                4 => pieces.insert(at, Piece::Write(0)),
                _ => pieces[at] = Piece::Junk(input.one_in(2), input.below(8192)),
            }
        }
        let indirect = input.one_in(2);
        self.driver.make(queue, slot, &bytes, &pieces, indirect);
        if input.one_in(2) {
            self.driver.twist(queue, slot, indirect, input);
        }
        self.wanted[usize::from(queue)].insert(slot, Wanted::Back);
        self.driver.offer(queue, slot);
        self.driver.kick(queue, true);
    }

    /// Waits for everything under way in queues that are whole, and looks at the answers.
    fn settle(&mut self) {
        let wild = self.is_wild();
        for queue in 0..QUEUES {
            let index = usize::from(queue);
            if self.wild[index] {
                continue;
            }
            self.driver.kick(queue, false);
            while !self.wanted[index].is_empty() {
                let done = self.driver.next(queue);
                let wanted = self.wanted[index].remove(&done.slot);
                match wanted.unwrap_or_else(|| panic!("{done:?} was not asked for, or twice")) {
                    Wanted::Back => {}
                    Wanted::Answer(status, len) => {
                        assert_eq!((done.status, done.len), (Some(status), len), "{done:?}");
                        if len == 21 {
                            let mut id = [0; 20];
                            id[..SERIAL.len()].copy_from_slice(SERIAL.as_bytes());
                            assert_eq!(done.written[..20], id);
                        }
                    }
                    Wanted::Read(sector, count) => {
                        let len = u32::try_from(count * 512 + 1).unwrap_or(0);
                        assert_eq!((done.status, done.len), (Some(0), len), "{done:?}");
                        if wild {
                            continue;
                        }
                        for (at, found) in (sector..).zip(done.written.chunks_exact(512)) {
                            self.sectors.entry(at).or_default().check(at, found);
                        }
                    }
                }
            }
        }
        self.busy.clear();
        self.driver.check_memory(wild);
    }

    /// Resets the device and begins anew.
    fn restart(&mut self, image: &Arc<dyn Image>, features: u64) {
        self.driver.device.reset();
        self.compare(image);
        self.wild.fill(false);
        self.wanted.iter_mut().for_each(HashMap::clear);
        self.busy.clear();
        self.driver.start(features);
    }

    /// Compares the disk with what is known of it, or makes it known.
    fn compare(&mut self, image: &Arc<dyn Image>) {
        let len = (KNOWN.end - KNOWN.start) * 512;
        let mut bytes = vec![0xee; usize::try_from(len).unwrap_or(0)];
        image
            .read_at(KNOWN.start * 512, &[VolatileSlice::from(&mut bytes[..])])
            .expect("a sound image reads");
        let wild = self.is_wild();
        for (at, found) in KNOWN.zip(bytes.chunks_exact(512)) {
            if wild {
                // A wild queue may have written any bytes: those are made known ones.
                self.sectors.remove(&at);
            } else {
                self.sectors.entry(at).or_default().check(at, found);
            }
        }
        if wild && !self.readonly {
            image.write_zeroes(KNOWN.start * 512, len, true).expect("a sound image is written");
        }
    }
}

impl Sector {
    fn check(&mut self, at: u64, found: &[u8]) {
        let is = |value: u32| found.chunks_exact(4).all(|word| word == value.to_le_bytes());
        if self.maybe_zero && is(0) {
            *self = Self::default();
        }
        assert!(is(self.value), "sector {at} holds {:x?} and not {:#x}", &found[..8], self.value);
    }
}

/// Cuts `len` bytes into pieces, mostly after the first `head`.
fn cut(len: u64, head: u64, input: &mut Input<'_>) -> impl Iterator<Item = u64> + use<> {
    let mut cuts = vec![head.min(len)];
    for _ in 0..input.below(4) {
        cuts.push(input.number(2) % (len + 1));
    }
    if input.one_in(3) {
        cuts.remove(0);
    }
    cuts.push(0);
    cuts.push(len);
    cuts.sort_unstable();
    cuts.dedup();
    let lens: Vec<_> = cuts.windows(2).map(|pair| pair[1] - pair[0]).collect();
    lens.into_iter()
}
