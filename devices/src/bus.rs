//! Address decoding: which device answers at an address of a port or memory space.

use std::fmt;
use std::sync::Arc;

/// A device behind a range of a bus.
///
/// Calls come from several vCPU threads at once; a device guards its own state.
pub trait BusDevice: Send + Sync {
    /// Fills `data` (1 to 8 bytes) from `offset` bytes into the device's range.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes `data` (1 to 8 bytes) written at `offset` bytes into the device's range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// A range that cannot be put on a bus.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// The range is empty or passes the end of the address space.
    #[error("device range {base:#x}+{len:#x} is empty or passes the end of the address space")]
    Range {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Another device already answers there.
    #[error("device range {base:#x}+{len:#x} overlaps the one at {other:#x}")]
    Overlap {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
        /// First address of the device that is already there.
        other: u64,
    },
}

struct Entry {
    base: u64,
    last: u64,
    device: Arc<dyn BusDevice>,
}

/// Devices by address. Built once, then only read, so look-ups take no lock.
#[derive(Default)]
pub struct Bus {
    entries: Vec<Entry>,
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.entries.iter().map(|e| format!("{:#x}..={:#x}", e.base, e.last))).finish()
    }
}

impl Bus {
    /// Puts `device` at `base`, `len` bytes long.
    ///
    /// # Errors
    ///
    /// [`Error`] if the range is not one, or is taken.
    pub fn insert(&mut self, base: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), Error> {
        let last = len.checked_sub(1).and_then(|n| base.checked_add(n)).ok_or(Error::Range { base, len })?;
        let at = self.entries.partition_point(|e| e.base < base);
        let before = at.checked_sub(1).map(|i| &self.entries[i]).filter(|e| e.last >= base);
        let after = self.entries.get(at).filter(|e| e.base <= last);
        if let Some(other) = before.or(after) {
            return Err(Error::Overlap { base, len, other: other.base });
        }
        self.entries.insert(at, Entry { base, last, device });
        Ok(())
    }

    fn find(&self, address: u64, len: usize) -> Option<(&dyn BusDevice, u64)> {
        let at = self.entries.partition_point(|e| e.base <= address).checked_sub(1)?;
        let entry = &self.entries[at];
        let end = address.checked_add(u64::try_from(len).ok()?.checked_sub(1)?)?;
        (end <= entry.last).then(|| (&*entry.device, address - entry.base))
    }

    /// Reads from whatever answers at `address`; false, and `data` all ones as on an empty bus, if nothing does.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.read(offset, data);
            true
        } else {
            data.fill(0xff);
            false
        }
    }

    /// Writes to whatever answers at `address`; false if nothing does.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.write(offset, data);
            true
        } else {
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Probe(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Probe {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn access_inside_a_range_reaches_its_device_with_the_offset() {
        let probe = Arc::new(Probe::default());
        let mut bus = Bus::default();
        bus.insert(0x100, 0x10, probe.clone()).unwrap();
        let mut data = [0; 2];
        assert!(bus.read(0x10e, &mut data));
        assert_eq!(data, [0xe, 0xe]);
        assert!(bus.write(0x100, &[1, 2]));
        assert_eq!(*probe.0.lock().unwrap(), [(0, vec![1, 2])]);
    }

    #[test]
    fn access_outside_or_across_the_end_reads_all_ones_and_is_reported() {
        let mut bus = Bus::default();
        bus.insert(0x100, 0x10, Arc::new(Probe::default())).unwrap();
        for address in [0, 0xff, 0x10f, 0x110, u64::MAX] {
            let mut data = [0; 4];
            assert!(!bus.read(address, &mut data), "{address:#x}");
            assert_eq!(data, [0xff; 4]);
            assert!(!bus.write(address, &data));
        }
    }

    #[test]
    fn overlapping_empty_and_wrapping_ranges_are_refused() {
        let mut bus = Bus::default();
        bus.insert(0x100, 0x10, Arc::new(Probe::default())).unwrap();
        for (base, len) in [(0x100, 1), (0xff, 2), (0x10f, 0x10), (0, 0x1000)] {
            let got = bus.insert(base, len, Arc::new(Probe::default()));
            assert_eq!(got, Err(Error::Overlap { base, len, other: 0x100 }));
        }
        for (base, len) in [(0, 0), (u64::MAX, 2)] {
            let got = bus.insert(base, len, Arc::new(Probe::default()));
            assert_eq!(got, Err(Error::Range { base, len }));
        }
        bus.insert(0x110, 0x10, Arc::new(Probe::default())).unwrap();
        bus.insert(0xf0, 0x10, Arc::new(Probe::default())).unwrap();
    }
}
