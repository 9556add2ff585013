//! A disk that is used at random, and what is known of it at every moment.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use vm_memory::VolatileSlice;

use super::recorder::Recorder;
use crate::image::{Access, Extent, Image, Place, Ticket};
use crate::thin::check::check_storage;
use crate::thin::memory::Bytes;
use crate::thin::{Create, Thin};

/// Numbers by chance (Steele, Lea and Flood: SplitMix).
#[derive(Debug, Clone)]
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() >> 1).unwrap() % end
    }

    pub(super) fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

/// Images of one kind, and what is done to them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kind {
    pub(super) cluster_bits: u8,
    pub(super) backing: bool,
    /// The most clusters that the file may have.
    pub(super) most: Option<u64>,
    /// Writes and syncs fail now and then.
    pub(super) fails: bool,
    pub(super) never_sync: bool,
}

/// What a sector holds: a number, repeated. 0 is zeroes; those of the backing begin here.
const BELOW: u32 = 1 << 31;
/// What no sector was ever given.
const TORN: u32 = u32::MAX;

/// The parts of the disk that are used: over the bounds of L2 and L1 pages, and where the disk ends.
#[derive(Debug, Clone)]
pub(super) struct Areas(Vec<Area>);

#[derive(Debug, Clone)]
struct Area {
    offset: u64,
    sectors: Range<usize>,
}

impl Areas {
    fn new(cluster_bits: u8) -> Self {
        let sectors = |clusters: usize| clusters << (cluster_bits - 9);
        let mut first = 0;
        let areas = [(0, 5), (510, 4), (131_070, 4)].map(|(cluster, clusters)| {
            let area = Area { offset: cluster << cluster_bits, sectors: first..first + sectors(clusters) };
            first = area.sectors.end;
            area
        });
        Self(areas.into())
    }

    fn count(&self) -> usize {
        self.0.last().unwrap().sectors.end
    }

    /// What every sector holds; what lies past the end counts as zeroes.
    pub(super) fn read(&self, image: &dyn Image) -> Result<Vec<u32>, String> {
        let mut values = vec![0; self.count()];
        let mut bytes = Vec::new();
        for area in &self.0 {
            let len = image.size().saturating_sub(area.offset).min(area.sectors.len() as u64 * 512);
            bytes.resize(usize::try_from(len).unwrap(), 0xee);
            let slices = [VolatileSlice::from(bytes.as_mut_slice())];
            image.read_at(area.offset, &slices).map_err(|error| format!("does not read: {error}"))?;
            for (value, sector) in values[area.sectors.clone()].iter_mut().zip(bytes.chunks_exact(512)) {
                let alike = sector[4..] == sector[..508];
                *value = if alike { u32::from_le_bytes(sector[..4].try_into().unwrap()) } else { TORN };
            }
        }
        Ok(values)
    }
}

/// A write, a discard or zeroes (0): which sectors it may have changed to what, and when.
#[derive(Debug, Clone)]
struct Event {
    value: u32,
    sectors: Range<usize>,
    /// Changes in the log when it began.
    begun: usize,
    /// Step in which it ended.
    ended: usize,
}

/// A moment at which everything was stable.
#[derive(Debug, Clone)]
pub(super) struct Stable {
    /// Changes in the log from which on that is so.
    pub(super) position: usize,
    step: usize,
    values: Vec<u32>,
    size: u64,
}

/// What images on this one would note of it, and what it held then.
#[derive(Debug)]
struct Noted {
    generation: u64,
    values: Vec<u32>,
    /// Changes in the log by then.
    position: usize,
}

#[derive(Debug)]
struct Transfer {
    ticket: Ticket,
    extents: Vec<Extent>,
    offset: u64,
    len: u64,
    event: usize,
    /// Its data are written when it ends.
    late: bool,
    /// Something else happened to the same sectors.
    crossed: bool,
}

/// A disk in use.
#[derive(Debug)]
pub(super) struct Disk {
    kind: Kind,
    pub(super) areas: Areas,
    backing: Option<Arc<dyn Image>>,
    pub(super) random: Random,
    pub(super) base: Bytes,
    pub(super) recorder: Recorder,
    thin: Option<Thin>,
    now: Vec<u32>,
    size: u64,
    /// What it may have grown to, if a call that failed did so after all.
    largest: u64,
    step: usize,
    value: u32,
    events: Vec<Event>,
    pub(super) stables: Vec<Stable>,
    noted: Vec<Noted>,
    in_flight: Vec<Transfer>,
    /// What was done, for whoever has to find out why it went wrong.
    pub(super) trace: Vec<String>,
}

fn path() -> &'static Path {
    Path::new("memory")
}

/// Makes free space leaked space.
fn forget_free_space(bytes: &mut Bytes, generation: u64) {
    let at = 4096 * (1 + generation % 2);
    let mut page = [0; 4096];
    bytes.read(at, &mut page).unwrap();
    page[56..72].fill(0);
    let sum = crc32c::crc32c(&page[..4092]);
    page[4092..].copy_from_slice(&sum.to_le_bytes());
    bytes.write(at, &page);
}

fn backing(cluster_bits: u8, areas: &Areas) -> Arc<dyn Image> {
    let size = (131_072 << cluster_bits) + 3 * 512;
    let mut bytes = Create::new(size).encode().unwrap();
    bytes.resize(65_536, 0);
    let memory = crate::thin::memory::Memory::new(&bytes);
    let thin = Thin::open_on(Box::new(memory.clone()), path(), true, None).unwrap();
    for area in &areas.0 {
        for index in area.sectors.clone().filter(|index| index / 7 % 5 != 0) {
            let offset = area.offset + (index - area.sectors.start) as u64 * 512;
            if offset < size {
                let value = BELOW + u32::try_from(index).unwrap();
                super::super::write(&thin, offset, &value.to_le_bytes().repeat(128));
            }
        }
    }
    drop(thin);
    Arc::new(Thin::open_on(Box::new(memory), path(), false, None).unwrap())
}

impl Disk {
    pub(super) fn new(kind: Kind, seed: u64) -> Self {
        let areas = Areas::new(kind.cluster_bits);
        let backing = kind.backing.then(|| backing(kind.cluster_bits, &areas));
        let size = (131_072 << kind.cluster_bits) + 5 * 512;
        let noted = backing.as_ref().map(|b| (b.path().to_owned(), b.format(), b.identity().unwrap()));
        let create = Create {
            size,
            cluster_bits: kind.cluster_bits,
            max_size: kind.most.map(|most| most << kind.cluster_bits),
            backing: noted,
        };
        let mut base = Bytes::default();
        base.write(0, &create.encode().unwrap());
        base.set_len(1 << kind.cluster_bits);
        let now = match &backing {
            Some(backing) => areas.read(&**backing).unwrap(),
            None => vec![0; areas.count()],
        };
        let mut disk = Self {
            kind,
            areas,
            backing,
            random: Random(seed),
            recorder: Recorder::new(Bytes::default(), false),
            base: Bytes::default(),
            thin: None,
            now: Vec::new(),
            size: 0,
            largest: 0,
            step: 0,
            value: 0,
            events: Vec::new(),
            stables: Vec::new(),
            noted: Vec::new(),
            in_flight: Vec::new(),
            trace: Vec::new(),
        };
        disk.restart(base, now, size, 0);
        disk
    }

    /// Goes on from a state that a crash has left, and in which the disk holds `now`.
    pub(super) fn restart(&mut self, mut base: Bytes, now: Vec<u32>, size: u64, generation: u64) {
        if self.random.one_in(2) {
            forget_free_space(&mut base, generation);
        }
        self.recorder = Recorder::new(base.clone(), self.kind.never_sync);
        self.base = base;
        self.events.clear();
        self.stables = vec![Stable { position: 0, step: self.step, values: now.clone(), size }];
        (self.now, self.size, self.largest) = (now, size, size);
        // The rest is of a time after that crash.
        let held = |noted: &Noted| noted.generation == generation && noted.values == self.now;
        self.noted.retain(|noted| noted.generation < generation || held(noted));
        self.noted.iter_mut().for_each(|noted| noted.position = 0);
        self.trace.clear();
    }

    pub(super) fn open(&self, bytes: Bytes) -> Result<Thin, String> {
        self.open_on(Recorder::new(bytes, true))
    }

    pub(super) fn open_on(&self, recorder: Recorder) -> Result<Thin, String> {
        Thin::open_on(Box::new(recorder), path(), true, self.backing.clone())
            .map_err(|error| format!("does not open: {error}"))
    }

    /// Whether the disk may hold `found` after a crash that some of the first `changes` changes have survived, those that
    /// had been waited for before change `interval` all of them.
    pub(super) fn allows(
        &self,
        thin: &Thin,
        found: &[u32],
        interval: usize,
        changes: usize,
    ) -> Result<(), String> {
        let stable = self.stables.iter().rev().find(|stable| stable.position <= interval).unwrap();
        if !(stable.size..=self.largest).contains(&thin.size()) {
            return Err(format!("{} bytes of disk, of which {} were stable", thin.size(), stable.size));
        }
        let generation = thin.identity().unwrap().state;
        let mut noted = self.noted.iter();
        if let Some(noted) = noted.find(|noted| noted.generation == generation && noted.position <= interval)
            && let Some(index) = (0..found.len()).find(|index| found[*index] != noted.values[*index])
        {
            return Err(format!(
                "sector {index} holds {:#x} and not {:#x} as when generation {generation} was noted",
                found[index], noted.values[index]
            ));
        }
        let since = |event: &&Event| event.ended > stable.step && event.begun < changes;
        let zeroed: Vec<_> =
            self.events.iter().filter(since).filter(|event| event.value == 0).map(|e| &e.sectors).collect();
        for (index, value) in
            found.iter().enumerate().filter(|(index, value)| stable.values[*index] != **value)
        {
            let allowed = match value {
                0 => zeroed.iter().any(|sectors| sectors.contains(&index)),
                _ => self
                    .events
                    .iter()
                    .filter(since)
                    .any(|event| event.value == *value && event.sectors.contains(&index)),
            };
            if !allowed {
                return Err(format!(
                    "sector {index} holds {value:#x}, neither {:#x}, which was stable, nor anything written since",
                    stable.values[index]
                ));
            }
        }
        Ok(())
    }

    fn thin(&self) -> &Thin {
        self.thin.as_ref().unwrap()
    }

    fn begin(&mut self) {
        self.recorder = self.recorder.for_next();
        let thin = self.open_on(self.recorder.clone()).unwrap();
        self.thin = Some(thin);
        self.look(0..0, None);
        self.note();
    }

    /// Kills the process that uses it, mostly in the middle of a flush, but not the host: the next one finds what is not stable
    /// yet too, and makes it so.
    fn kill(&mut self) {
        let changes = self.random.below(10);
        self.trace.push(format!("{}: flush, killed after {changes} changes", self.recorder.position()));
        self.recorder.kill_after(changes);
        let _ = self.thin().flush();
        self.recorder.kill_after(0);
        self.in_flight.clear();
        let before = self.step;
        self.events.iter_mut().for_each(|event| event.ended = event.ended.min(before));
        self.thin = None;
        self.step += 1;
        if self.random.one_in(3) {
            self.recorder = self.recorder.for_next();
            let changes = self.random.below(6);
            self.trace.push(format!("{}: repair, killed after {changes}", self.recorder.position()));
            self.recorder.kill_after(changes);
            let _ = check_storage(&self.recorder, true);
        }
        self.recorder = self.recorder.for_next();
        let thin = self.open_on(self.recorder.clone()).unwrap();
        let found = self.areas.read(&thin).unwrap();
        let position = self.recorder.position();
        if let Err(error) = self.allows(&thin, &found, position, position) {
            panic!("after a kill: {error}: {:#?}", self.trace);
        }
        (self.now, self.size) = (found, thin.size());
        self.thin = Some(thin);
        self.stable();
        self.note();
    }

    fn note(&mut self) {
        let generation = self.thin().identity().unwrap().state;
        let position = self.recorder.position();
        self.noted.push(Noted { generation, values: self.now.clone(), position });
    }

    /// Everything done so far is stable.
    fn stable(&mut self) {
        let log = self.recorder.log();
        let synced = log.ops.iter().rposition(|op| matches!(op, super::recorder::Op::Sync)).map(|at| at + 1);
        // Nothing is stable with cache mode `unsafe` but to those who find what the process left.
        let position = if self.kind.never_sync { log.ops.len() } else { synced.unwrap_or(0) };
        drop(log);
        let (values, size) = (self.now.clone(), self.size);
        self.stables.push(Stable { position, step: self.step, values, size });
    }

    /// Reads everything. Only `sectors` may have changed, to `value` or, if that is none, to anything that is on its way.
    fn look(&mut self, sectors: Range<usize>, value: Option<u32>) {
        let found = self.areas.read(self.thin()).unwrap();
        for (index, (found, before)) in found.iter().zip(&self.now).enumerate() {
            let ok = match value {
                Some(value) if sectors.contains(&index) => *found == value,
                None if sectors.contains(&index) => {
                    let mut events = self.events.iter().filter(|event| event.ended >= self.step);
                    found == before || events.any(|e| e.value == *found && e.sectors.contains(&index))
                }
                _ => found == before,
            };
            assert!(ok, "sector {index} holds {found:#x} after {before:#x}: {:#?}", self.trace);
        }
        self.now = found;
    }

    /// A range within the disk, and its sectors.
    fn range(&mut self) -> (u64, u64, Range<usize>) {
        let area = self.areas.0[self.random.below(self.areas.0.len())].clone();
        let sectors = (self.size - area.offset).min(area.sectors.len() as u64 * 512) / 512;
        let cluster = 1 << (self.kind.cluster_bits - 9);
        let unit = [1, cluster / 16, cluster / 16, cluster][self.random.below(4)];
        let at = self.random.below(usize::try_from(sectors).unwrap()) / unit * unit;
        let most = [4, 20, 48][self.random.below(3)];
        let len = ((1 + self.random.below(most)) * unit).min(3 * cluster);
        let len = len.min(usize::try_from(sectors).unwrap() - at);
        let first = area.sectors.start + at;
        (area.offset + at as u64 * 512, len as u64 * 512, first..first + len)
    }

    fn event(&mut self, value: u32, sectors: Range<usize>) -> usize {
        let overlaps = |other: &Range<usize>| other.start < sectors.end && sectors.start < other.end;
        for transfer in &mut self.in_flight {
            transfer.crossed |= overlaps(&self.events[transfer.event].sectors);
        }
        self.events.push(Event { value, sectors, begun: self.recorder.position(), ended: self.step });
        self.events.len() - 1
    }

    fn value(&mut self) -> u32 {
        self.value += 1;
        self.value
    }

    /// Ends the transfers that a call for this range would wait for.
    fn make_way(&mut self, offset: u64, len: u64) {
        let sub = 1 << (self.kind.cluster_bits - 4);
        let (from, to) = (offset / sub * sub, (offset + len).next_multiple_of(sub));
        while let Some(index) = self.in_flight.iter().position(|transfer| {
            transfer.ticket.0 & 3 == 2
                && transfer.offset / sub * sub < to
                && from < (transfer.offset + transfer.len).next_multiple_of(sub)
        }) {
            self.end(index, true);
        }
    }

    fn store(&self, extents: &[Extent], value: u32, most: u64) {
        let mut left = most;
        for extent in extents {
            let Place::File { file: 0, offset } = extent.place else { panic!("written to {extent:?}") };
            let len = usize::try_from(extent.len.min(left)).unwrap();
            left -= len as u64;
            if len > 0 {
                self.recorder.write(&value.to_le_bytes().repeat(len / 4), offset);
            }
        }
    }

    /// Ends a transfer, perhaps as one that failed half-way.
    fn end(&mut self, index: usize, ok: bool) {
        let transfer = self.in_flight.swap_remove(index);
        let Event { value, sectors, .. } = self.events[transfer.event].clone();
        if transfer.late {
            let most = if ok { u64::MAX } else { transfer.len / 1024 * 512 };
            self.store(&transfer.extents, value, most);
        }
        self.events[transfer.event].ended = self.step;
        self.thin().finish(transfer.ticket, ok);
        self.look(sectors, (ok && !transfer.crossed).then_some(value));
    }

    /// Whether a call went well; it may fail only where that was arranged.
    fn went_well(&mut self, result: std::io::Result<()>) -> bool {
        let Err(error) = result else { return true };
        let full = error.kind() == std::io::ErrorKind::QuotaExceeded && self.kind.most.is_some();
        let arranged = self.kind.fails && error.kind() == std::io::ErrorKind::Other;
        assert!(full || arranged, "{error}: {:#?}", self.trace);
        self.trace.push(format!("    {error}"));
        false
    }

    /// Does a call for a range that makes it `value`.
    fn change(
        &mut self,
        what: &str,
        value: u32,
        call: impl FnOnce(&Thin, u64, u64) -> std::io::Result<()>,
        exact: bool,
    ) {
        let (offset, len, sectors) = self.range();
        self.make_way(offset, len);
        self.trace.push(format!("{}: {what} {len:#x} at {offset:#x}", self.recorder.position()));
        self.event(value, sectors.clone());
        let result = call(self.thin(), offset, len);
        let full = matches!(&result, Err(error) if error.kind() == std::io::ErrorKind::QuotaExceeded);
        let ok = self.went_well(result);
        if full && what == "write" {
            // Nothing was changed.
            self.look(0..0, None);
        } else {
            self.look(sectors, (ok && exact).then_some(value));
        }
    }

    fn write(&mut self) {
        let value = self.value();
        let call = |thin: &Thin, offset, len| {
            let bytes = value.to_le_bytes().repeat(usize::try_from(len / 4).unwrap());
            super::super::try_write(thin, offset, &bytes)
        };
        self.change("write", value, call, true);
    }

    /// Gives up what a transfer in place lies in, and fills space anew before it ends.
    fn pull_away(&mut self, index: usize) {
        let Transfer { offset, len, event, .. } = self.in_flight[index];
        let sectors = self.events[event].sectors.clone();
        let cluster = 1 << self.kind.cluster_bits;
        let (from, to) =
            (offset / cluster * cluster, (offset + len).next_multiple_of(cluster).min(self.size));
        self.make_way(from, to - from);
        self.trace.push(format!("{}: discard {from:#x} to {to:#x}", self.recorder.position()));
        let before = usize::try_from((offset - from) / 512).unwrap();
        let first = sectors.start - before;
        let sectors = first..first + usize::try_from((to - from) / 512).unwrap();
        self.event(0, sectors.clone());
        let result = self.thin().discard(from, to - from);
        self.went_well(result);
        self.look(sectors, None);
        for _ in 0..4 {
            self.step += 1;
            self.settle("flush", |thin| thin.flush());
            self.step += 1;
            self.write();
        }
    }

    fn located(&mut self) {
        let (offset, len, sectors) = self.range();
        self.make_way(offset, len);
        let mut extents = Vec::new();
        let Some(ticket) = self.thin().locate(offset, len, Access::Write, &mut extents) else { return };
        let value = self.value();
        let event = self.event(value, sectors.clone());
        let late = self.random.one_in(2);
        let kept = self.kind.most.is_none() && !self.random.one_in(3) && self.in_flight.len() < 4;
        self.trace.push(format!(
            "{}: locate {len:#x} at {offset:#x}, {}",
            self.recorder.position(),
            if kept { "to be ended later" } else { "at once" }
        ));
        let crossed = self.in_flight.iter().any(|t| t.offset < offset + len && offset < t.offset + t.len);
        if !late {
            self.store(&extents, value, u64::MAX);
        }
        self.events[event].ended = usize::MAX;
        self.in_flight.push(Transfer { ticket, extents, offset, len, event, late, crossed });
        self.look(sectors, None);
        if !kept {
            let ok = !self.random.one_in(6);
            self.end(self.in_flight.len() - 1, ok);
        }
    }

    /// A call after which everything is stable, if it goes well.
    fn settle(&mut self, what: &str, call: impl FnOnce(&Thin) -> std::io::Result<()>) -> bool {
        self.trace.push(format!("{}: {what}", self.recorder.position()));
        let result = call(self.thin());
        let ok = self.went_well(result);
        self.look(0..0, None);
        if ok {
            self.stable();
        }
        ok
    }

    fn end_all(&mut self) {
        while !self.in_flight.is_empty() {
            self.end(0, true);
        }
    }

    /// Has another take its place, as when its backing becomes another.
    fn succeed(&mut self) {
        self.trace.push(format!("{}: successor", self.recorder.position()));
        let next = self.thin().successor(path(), self.backing.clone());
        match next.map_err(std::io::Error::other) {
            Ok(next) => {
                self.stable();
                self.thin = Some(next);
                self.look(0..0, None);
                self.note();
            }
            Err(error) => drop(self.went_well(Err(error))),
        }
    }

    /// Makes it one that needs no backing.
    fn flatten(&mut self) {
        self.end_all();
        self.trace.push(format!("{}: flatten", self.recorder.position()));
        for area in self.areas.0.clone() {
            let len = (self.size - area.offset).min(area.sectors.len() as u64 * 512);
            let result = self.thin().pull(area.offset, len);
            if !self.went_well(result) {
                return;
            }
        }
        self.settle("no backing", |thin| thin.set_backing(None));
    }

    fn close(&mut self) {
        self.end_all();
        let mut log = self.recorder.log();
        (log.sync_fails, log.write_fails) = (None, None);
        drop(log);
        self.trace.push(format!("{}: close", self.recorder.position()));
        self.thin = None;
        self.stable();
    }

    /// Repairs it while it is closed.
    fn repair(&mut self) {
        self.recorder = self.recorder.for_next();
        self.trace.push(format!("{}: repair", self.recorder.position()));
        let report = check_storage(&self.recorder, true).unwrap();
        assert_eq!(report.errors, Vec::<String>::new(), "{:#?}", self.trace);
    }

    fn grow(&mut self) {
        // As far as the last area goes.
        let most = (131_074 << self.kind.cluster_bits) - self.size;
        let by = [512, 2048, 12 * 512, 40 * 512, 130 * 512][self.random.below(5)].min(most);
        let new = self.size + by;
        self.largest = self.largest.max(new);
        self.trace.push(format!("{}: grow to {new:#x}", self.recorder.position()));
        let result = self.thin().grow(new);
        let ok = self.went_well(result);
        if ok {
            self.size = new;
        }
        assert_eq!(self.thin().size(), self.size);
        self.look(0..0, None);
        if ok {
            self.stable();
        }
    }

    fn fail(&mut self) {
        let mut log = self.recorder.log();
        if self.random.one_in(3) {
            log.write_fails = Some(self.random.below(12) * 1024);
        } else {
            log.sync_fails = Some(self.random.below(3));
        }
        let what = (log.write_fails, log.sync_fails);
        drop(log);
        self.trace.push(format!("{}: a write or sync is to fail: {what:?}", self.recorder.position()));
        for _ in 0..self.random.below(4) {
            self.write();
            self.step += 1;
            self.settle("flush", |thin| thin.flush());
            self.step += 1;
        }
    }

    /// Uses it for some time.
    pub(super) fn use_it(&mut self, steps: usize) {
        self.step += 1;
        if self.random.one_in(3) {
            self.repair();
        }
        self.begin();
        for _ in 0..steps {
            self.step += 1;
            match self.random.below(32) {
                0 | 1 if self.kind.fails => self.fail(),
                0..7 => self.write(),
                7..14 => self.located(),
                14..17 if !self.in_flight.is_empty() => {
                    let (index, ok) = (self.random.below(self.in_flight.len()), !self.random.one_in(4));
                    if self.random.one_in(2) {
                        self.pull_away(index);
                        continue;
                    }
                    self.trace.push(format!("{}: end {index}, {ok}", self.recorder.position()));
                    self.end(index, ok);
                }
                14..20 => self.change("discard", 0, |thin, offset, len| thin.discard(offset, len), false),
                20 | 21 => {
                    let unmap = self.random.one_in(2);
                    self.change("zero", 0, |thin, offset, len| thin.write_zeroes(offset, len, unmap), true);
                }
                22 if self.kind.backing && self.random.one_in(4) => self.flatten(),
                22 | 23 if self.kind.backing => {
                    let (offset, len, _) = self.range();
                    self.make_way(offset, len);
                    self.trace.push(format!("{}: pull {len:#x} at {offset:#x}", self.recorder.position()));
                    let result = self.thin().pull(offset, len);
                    self.went_well(result);
                    self.look(0..0, None);
                }
                22..27 => drop(self.settle("flush", |thin| thin.flush())),
                27 => self.grow(),
                28 if self.kind.most.is_some() => {
                    let most = self.kind.most.map(|most| (most + 4) << self.kind.cluster_bits);
                    self.settle("higher limit", |thin| thin.set_max_size(most));
                }
                28 => {
                    // As when another image is laid on this one, and taken away again.
                    self.end_all();
                    let frozen = self.settle("freeze", |thin| {
                        thin.set_writable(false).map_err(std::io::Error::other)?;
                        thin.set_writable(true).map_err(std::io::Error::other)
                    });
                    if frozen {
                        self.note();
                    }
                    self.succeed();
                }
                29 => {
                    self.close();
                    self.step += 1;
                    self.repair();
                    self.begin();
                }
                30 => self.kill(),
                _ => {
                    self.close();
                    self.step += 1;
                    self.begin();
                }
            }
        }
        self.step += 1;
        self.close();
    }
}
