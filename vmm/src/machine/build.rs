//! Making a machine, up to the point where its processors could run.

use std::sync::Arc;

use devices::bus::Bus;
use devices::legacy::power::{self, Power};
use devices::legacy::reset::{self, I8042};
use devices::legacy::serial::{self, Serial};
use devices::legacy::{Host, Request};
use devices::virtio::block::Block;
use devices::virtio::mmio::MmioTransport;
use devices::virtio::net::Net;
use devices::virtio::rng::Rng;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VmFd};

use super::console::Console;
use super::disks::{Disks, block_options};
use super::ending::{Ending, Outcome};
use super::files::Files;
use super::slots::Slots;
use super::{Error, host};
use crate::config::model::Config;
use crate::vcpu::gate::Gate;
use crate::vcpu::{Surroundings, Vcpu, cpuid};
use crate::{acpi, boot, interrupt, memory};

/// Three pages that KVM uses on Intel processors, in the hole below 4 GiB and away from everything else
/// (`Documentation/virt/kvm/api.rst`, `KVM_SET_TSS_ADDR`).
const TSS: usize = 0xfffb_d000;
/// A page of the same kind, before them (`KVM_SET_IDENTITY_MAP_ADDR`).
const IDENTITY_MAP: u64 = 0xfffb_c000;

/// How often an interrupted creation of a machine is tried again.
const CREATE_TRIES: usize = 100;

/// A machine that stands still.
#[derive(Debug)]
pub struct Built {
    /// Kept open as long as the guest runs.
    pub vm: VmFd,
    pub vcpus: Vec<Vcpu>,
    pub around: Arc<Surroundings>,
    pub devices: Vec<Arc<MmioTransport>>,
    pub power: Arc<Power>,
    pub serial: Arc<Serial>,
    pub console: Console,
    pub disks: Disks,
}

/// What the guest asks of its machine ends its run.
impl Host for Ending {
    fn request(&self, request: Request) {
        self.report(match request {
            Request::PowerOff => Outcome::PowerOff,
            Request::Reset => Outcome::Reset,
        });
    }
}

/// Builds the machine of `config` from `files`.
pub fn build(
    config: &Config,
    mut files: Files,
    ending: &Arc<Ending>,
    mut console: Console,
) -> Result<Built, Error> {
    let kvm = Kvm::new().map_err(Error::Kvm)?;
    let vm = create_vm(&kvm).map_err(refused("create a virtual machine"))?;
    // Memory before the interrupt controllers: what KVM makes for those leaves a grace period behind that a change of
    // memory would have to wait for, which takes milliseconds.
    let ram = Arc::new(memory::create(config.memory.size, &config.memory.backing)?);
    give_memory(&vm, &ram)?;
    vm.set_identity_map_address(IDENTITY_MAP).map_err(refused("place its identity map"))?;
    vm.set_tss_address(TSS).map_err(refused("place its task state segment"))?;
    interrupt::create_controllers(&vm)?;
    let vcpus = (0..config.cpu.count).map(|id| Vcpu::create(&vm, id)).collect::<Result<Vec<_>, _>>()?;
    set_up(&kvm, config, &vcpus)?;

    let (mut ports, mut mmio) = (Bus::default(), Bus::default());
    let serial_line = Arc::new(interrupt::line(&vm, interrupt::SERIAL_GSI)?);
    let serial = Arc::new(Serial::new(serial_line, console.take_output()).map_err(host("the serial port"))?);
    ports.insert(serial::COM1, serial::PORT_COUNT, serial.clone())?;
    let button_line = Arc::new(interrupt::line(&vm, interrupt::GED_GSI)?);
    let power = Arc::new(Power::new(ending.clone(), button_line));
    ports.insert(power::PORT_BASE.into(), power::PORT_COUNT.into(), power.clone())?;
    ports.insert(reset::PORT_BASE, reset::PORT_COUNT, Arc::new(I8042::new(ending.clone())))?;

    let mut slots = Slots::default();
    let mut disks = Disks::new(&config.name);
    for (index, (disk, medium)) in config.disks.iter().zip(files.disks).enumerate() {
        let options = block_options(disk, &config.name, index);
        let (block, control) = Block::new(Arc::clone(&medium.opened.image), options);
        slots.add(&vm, &mut mmio, &ram, Box::new(block))?;
        disks.add(disk, medium, control);
    }
    for (tap, mac) in files.taps {
        slots.add(&vm, &mut mmio, &ram, Box::new(Net::new(Box::new(tap), mac)))?;
    }
    if config.rng {
        slots.add(&vm, &mut mmio, &ram, Box::new(Rng::default()))?;
    }

    acpi::write_tables(&ram, config.cpu.count, slots.places())?;
    let cmdline = slots.name_on(&config.boot.cmdline);
    let entry = boot::load(&ram, &mut files.kernel, files.initrd.as_mut(), &cmdline, true)?;
    memory::advise_huge_pages(&ram, &config.memory.backing);
    if let Some(first) = vcpus.first() {
        first.set_entry(|regs, sregs| entry.configure(regs, sregs))?;
    }
    let gate = Gate::new(vcpus.len());
    let around = Arc::new(Surroundings { memory: ram, ports, mmio, gate });
    Ok(Built { vm, vcpus, around, devices: slots.into_transports(), power, serial, console, disks })
}

/// KVM gives up with EINTR when anything is pending for the thread, which need not be a signal.
fn create_vm(kvm: &Kvm) -> Result<VmFd, kvm_ioctls::Error> {
    let mut made = kvm.create_vm();
    for _ in 0..CREATE_TRIES {
        match made {
            Err(error) if error.errno() == libc::EINTR => made = kvm.create_vm(),
            _ => break,
        }
    }
    made
}

fn refused(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |source| Error::Refused { what, source }
}

fn give_memory(vm: &VmFd, ram: &devices::GuestRam) -> Result<(), Error> {
    for (slot, (guest_phys_addr, memory_size, userspace_addr)) in (0..).zip(memory::host_regions(ram)) {
        let region =
            kvm_userspace_memory_region { slot, flags: 0, guest_phys_addr, memory_size, userspace_addr };
        // SAFETY: the range is a mapping of guest memory, which outlives the machine: vCPU threads, which alone make KVM
        // use it, hold a reference to it.
        unsafe { vm.set_user_memory_region(region) }.map_err(refused("take the guest's memory"))?;
    }
    Ok(())
}

fn set_up(kvm: &Kvm, config: &Config, vcpus: &[Vcpu]) -> Result<(), Error> {
    let supported: CpuId = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(refused("tell which processor features it supports"))?;
    let tsc_khz = vcpus.first().and_then(Vcpu::tsc_khz);
    let mut cpuid = cpuid::common(supported, config.cpu.model, config.cpu.count, tsc_khz)?;
    vcpus.iter().try_for_each(|vcpu| vcpu.set_up(&mut cpuid))?;
    Ok(())
}
