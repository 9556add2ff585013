//! Firmware tables of a hardware-reduced ACPI machine (ACPI 6.5): what processors, interrupt controllers and devices
//! there are, and how to switch it off.

use acpi_tables::aml;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use devices::GuestRam;
use devices::legacy::{power, serial};
use vm_memory::{Bytes, GuestAddress};

use crate::boot::RSDP;
use crate::interrupt::{GED_GSI, SERIAL_GSI};

/// Where the I/O APIC that KVM emulates answers.
const IOAPIC: u32 = 0xfec0_0000;
/// Where the local APICs answer.
const LOCAL_APIC: u32 = 0xfee0_0000;
/// End of the range that holds the tables, which begins at [`RSDP`].
const END: u64 = 0x10_0000;

const OEM: [u8; 6] = *b"VMM   ";
const OEM_TABLE: [u8; 8] = *b"VMMMACHN";
const OEM_REVISION: u32 = 1;
const DSDT_REVISION: u8 = 2;

/// Offsets in the FADT, which acpi_tables' builder leaves zero (ACPI 6.5, table 5.9).
mod fadt {
    pub const BOOT_ARCH: usize = 109;
    pub const FLAGS: usize = 112;
    pub const RESET_REG: usize = 116;
    pub const RESET_VALUE: usize = 128;
    pub const SLEEP_CONTROL: usize = 244;
    pub const SLEEP_STATUS: usize = 256;
    /// `IAPC_BOOT_ARCH`: no VGA (bit 2), no CMOS clock (bit 5).
    pub const NO_VGA_NO_RTC: u16 = 1 << 2 | 1 << 5;
    /// `RESET_REG_SUP`.
    pub const RESET_SUPPORTED: u32 = 1 << 10;
}

/// Tables that cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// They are too long.
    #[error("the ACPI tables need {len} bytes; there is room for {}", END - RSDP)]
    Size {
        /// Their length.
        len: u64,
    },
    /// The memory is missing.
    #[error("guest memory at {address:#x}, where the ACPI tables go, cannot be written")]
    Memory {
        /// Guest-physical address.
        address: u64,
    },
}

/// A virtio device on MMIO.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VirtioMmio {
    /// Guest-physical address of its registers.
    pub base: u32,
    /// Length of the register window in bytes.
    pub len: u32,
    /// Its interrupt.
    pub gsi: u32,
}

/// Writes the tables for a machine of `vcpus` processors, with APIC IDs from 0 on, and the given devices. The root
/// pointer comes to lie at [`RSDP`].
///
/// # Errors
///
/// [`Error`] if they do not fit.
pub fn write_tables(memory: &GuestRam, vcpus: u8, devices: &[VirtioMmio]) -> Result<(), Error> {
    let mut writer = Writer { memory, at: RSDP + align(Rsdp::len() as u64) };
    let dsdt = writer.put(dsdt(devices).as_slice())?;
    let fadt = writer.put(fixed_description(dsdt).as_slice())?;
    let madt = writer.put(&bytes(&interrupt_controllers(vcpus)))?;
    let mut root = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    root.add_entry(fadt);
    root.add_entry(madt);
    let root = writer.put(&bytes(&root))?;
    memory
        .write_slice(&bytes(&Rsdp::new(OEM, root)), GuestAddress(RSDP))
        .map_err(|_| Error::Memory { address: RSDP })
}

fn align(address: u64) -> u64 {
    address.next_multiple_of(16)
}

struct Writer<'a> {
    memory: &'a GuestRam,
    at: u64,
}

impl Writer<'_> {
    /// Writes a table and says where.
    fn put(&mut self, table: &[u8]) -> Result<u64, Error> {
        let address = self.at;
        let end = address + table.len() as u64;
        if end > END {
            return Err(Error::Size { len: end - RSDP });
        }
        self.memory.write_slice(table, GuestAddress(address)).map_err(|_| Error::Memory { address })?;
        self.at = align(end);
        Ok(address)
    }
}

struct Bytes8(Vec<u8>);

impl AmlSink for Bytes8 {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut sink = Bytes8(Vec::new());
    aml.to_aml_bytes(&mut sink);
    sink.0
}

fn register(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into())
}

fn fixed_description(dsdt: u64) -> Sdt {
    let table = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .finalize();
    let bytes = bytes(&table);
    let mut sdt = Sdt::new(*b"FACP", 36, bytes[8], OEM, OEM_TABLE, OEM_REVISION);
    sdt.append_slice(&bytes[36..]);
    sdt.write_u16(fadt::BOOT_ARCH, fadt::NO_VGA_NO_RTC);
    let flags = bytes[fadt::FLAGS..fadt::FLAGS + 4].try_into().map_or(0, u32::from_le_bytes);
    sdt.write_u32(fadt::FLAGS, flags | fadt::RESET_SUPPORTED);
    sdt.write_bytes(fadt::RESET_REG, &self::bytes(&register(power::RESET)));
    sdt.write_u8(fadt::RESET_VALUE, power::RESET_VALUE);
    sdt.write_bytes(fadt::SLEEP_CONTROL, &self::bytes(&register(power::SLEEP_CONTROL)));
    sdt.write_bytes(fadt::SLEEP_STATUS, &self::bytes(&register(power::SLEEP_STATUS)));
    sdt
}

fn interrupt_controllers(vcpus: u8) -> MADT {
    let mut table = MADT::new(OEM, OEM_TABLE, OEM_REVISION, LocalInterruptController::Address(LOCAL_APIC));
    for id in 0..vcpus {
        table.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    table.add_structure(IoApic::new(0, IOAPIC, 0));
    table
}

fn dsdt(devices: &[VirtioMmio]) -> Sdt {
    let mut table = Sdt::new(*b"DSDT", 36, DSDT_REVISION, OEM, OEM_TABLE, OEM_REVISION);
    let sleep: &dyn Aml = &aml::Name::new("_S5_".into(), &aml::Package::new(vec![&power::SLEEP_TYPE_S5]));
    table.append_slice(&bytes(sleep));
    table.append_slice(&serial_port());
    for (device, index) in devices.iter().zip(0_u32..) {
        table.append_slice(&virtio(index, *device));
    }
    table.append_slice(&power_button());
    table
}

fn serial_port() -> Vec<u8> {
    let base = u16::try_from(serial::COM1).unwrap_or_default();
    let len = u8::try_from(serial::PORT_COUNT).unwrap_or_default();
    bytes(&aml::Device::new(
        "_SB_.COM1".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::IO::new(base, base, 0, len),
                    &aml::Interrupt::new(true, true, false, false, SERIAL_GSI),
                ]),
            ),
        ],
    ))
}

fn virtio(index: u32, device: VirtioMmio) -> Vec<u8> {
    let name = format!("_SB_.V{index:03}");
    bytes(&aml::Device::new(
        name.as_str().into(),
        vec![
            &aml::Name::new("_HID".into(), &"LNRO0005"),
            &aml::Name::new("_UID".into(), &index),
            &aml::Name::new("_CCA".into(), &aml::ONE),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::Memory32Fixed::new(true, device.base, device.len),
                    &aml::Interrupt::new(true, true, false, false, device.gsi),
                ]),
            ),
        ],
    ))
}

/// The power button, and the generic event device whose interrupt tells that it was pressed (ACPI 6.5, section 5.6.9).
fn power_button() -> Vec<u8> {
    let button = bytes(&aml::Device::new(
        "_SB_.PWRB".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0C0C")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
        ],
    ));
    let events = aml::Path::new("EVTS");
    let pressed = aml::And::new(&aml::Local(1), &aml::Local(0), &power::EVENT_POWER_BUTTON);
    let port = usize::from(power::EVENTS);
    let region = aml::OpRegion::new("EVTR".into(), aml::OpRegionSpace::SystemIO, &port, &1_usize);
    let field = aml::Field::new(
        "EVTR".into(),
        aml::FieldAccessType::Byte,
        aml::FieldLockRule::NoLock,
        aml::FieldUpdateRule::WriteAsZeroes,
        vec![aml::FieldEntry::Named(*b"EVTS", 8)],
    );
    let ged = bytes(&aml::Device::new(
        "_SB_.GED_".into(),
        vec![
            &aml::Name::new("_HID".into(), &"ACPI0013"),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&aml::Interrupt::new(true, true, false, false, GED_GSI)]),
            ),
            &region,
            &field,
            &aml::Method::new(
                "_EVT".into(),
                1,
                true,
                vec![
                    // Reading takes the events, so it is done once.
                    &aml::Store::new(&aml::Local(0), &events),
                    &pressed,
                    &aml::If::new(
                        &aml::Equal::new(&aml::Local(1), &power::EVENT_POWER_BUTTON),
                        vec![&aml::Notify::new(&aml::Path::new("\\_SB_.PWRB"), &0x80_u8)],
                    ),
                ],
            ),
        ],
    ));
    [button, ged].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::model::Backing;
    use crate::memory;
    use proptest::prelude::*;

    fn read(memory: &GuestRam, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        memory.read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }

    fn table(memory: &GuestRam, address: u64) -> Vec<u8> {
        let len = u32::from_le_bytes(read(memory, address + 4, 4).try_into().unwrap());
        read(memory, address, usize::try_from(len).unwrap())
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn any_number_of_processors_and_devices_gives_linked_tables_with_right_checksums(
            vcpus in 1_u8..=64, count in 0_usize..=18
        ) {
            let memory = memory::create(2 << 20, &Backing::Anonymous).unwrap();
            let device = |i: u32| VirtioMmio { base: 0xd000_0000 + i * 0x1000, len: 0x1000, gsi: 5 + i };
            let devices: Vec<_> = (0..18).map(device).take(count).collect();
            write_tables(&memory, vcpus, &devices).unwrap();
            let root = read(&memory, RSDP, 36);
            prop_assert_eq!(&root[..8], b"RSD PTR ");
            prop_assert_eq!((sum(&root[..20]), sum(&root)), (0, 0));
            let xsdt = table(&memory, u64_at(&root, 24));
            let [fadt, madt] = [36, 44].map(|at| table(&memory, u64_at(&xsdt, at)));
            let dsdt = table(&memory, u64_at(&fadt, 140));
            for (name, table) in [(b"XSDT", &xsdt), (b"FACP", &fadt), (b"APIC", &madt), (b"DSDT", &dsdt)] {
                prop_assert_eq!(&table[..4], name);
                prop_assert_eq!(sum(table), 0);
            }
            prop_assert_eq!(madt.len(), 44 + 8 * usize::from(vcpus) + 12);
            let found = dsdt.windows(8).filter(|window| window == b"LNRO0005").count();
            prop_assert_eq!(found, count);
        }
    }

    #[test]
    fn fixed_description_names_the_registers_of_the_power_device() {
        let table = fixed_description(0x1234);
        let bytes = table.as_slice();
        let flags = u32::from_le_bytes(bytes[112..116].try_into().unwrap());
        assert_eq!(flags, 1 << 20 | 1 << 10, "hardware-reduced, with a reset register");
        for (at, port) in [(116, 0x602), (244, 0x600), (256, 0x601)] {
            assert_eq!((bytes[at], u64_at(bytes, at + 4)), (1, port), "system I/O");
        }
        assert_eq!((bytes[128], u64_at(bytes, 140)), (1, 0x1234));
    }
}
