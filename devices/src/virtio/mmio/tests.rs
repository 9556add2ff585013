use super::*;
use proptest::prelude::*;
use vm_memory::GuestAddress;

#[derive(Debug, Default)]
struct Log {
    events: Vec<&'static str>,
    refuse: bool,
    features: u64,
    queues: Vec<(u16, u16)>,
    interrupt: Option<Arc<dyn VirtioInterrupt>>,
}

#[derive(Debug)]
struct Fake(Arc<Mutex<Log>>);

const OFFERED: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1;

impl VirtioDevice for Fake {
    fn device_id(&self) -> u32 {
        42
    }
    fn queue_sizes(&self) -> &[u16] {
        &[256, 64]
    }
    fn features(&self) -> u64 {
        OFFERED
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(u8::try_from(offset & 0xff).unwrap());
    }
    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let mut log = self.0.lock().unwrap();
        if log.refuse {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        log.events.push("activate");
        log.features = activation.features;
        assert!(activation.queues.iter().all(|q| q.queue.is_valid(&*activation.memory)));
        log.queues = activation.queues.iter().map(|q| (q.index, q.queue.size())).collect();
        log.interrupt = Some(activation.interrupt);
        Ok(())
    }
    fn pause(&mut self) {
        self.0.lock().unwrap().events.push("pause");
    }
    fn resume(&mut self) {
        self.0.lock().unwrap().events.push("resume");
    }
    fn reset(&mut self) {
        self.0.lock().unwrap().events.push("reset");
    }
}

struct Rig {
    transport: MmioTransport,
    log: Arc<Mutex<Log>>,
    line: Arc<EventFd>,
}

impl Rig {
    fn new() -> Self {
        let log = Arc::new(Mutex::new(Log::default()));
        let line = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let memory = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap());
        let transport = MmioTransport::new(Box::new(Fake(log.clone())), memory, line.clone()).unwrap();
        Self { transport, log, line }
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn negotiate(&self, features: u64) {
        self.write(reg::STATUS, reg::ACKNOWLEDGE);
        self.write(reg::STATUS, reg::ACKNOWLEDGE | reg::DRIVER);
        for select in 0..2 {
            self.write(reg::DRIVER_FEATURES_SEL, select);
            self.write(reg::DRIVER_FEATURES, word(features, select));
        }
        self.write(reg::STATUS, reg::ACKNOWLEDGE | reg::DRIVER | reg::FEATURES_OK);
    }

    fn queue(&self, index: u32, base: u32) {
        self.write(reg::QUEUE_SEL, index);
        self.write(reg::QUEUE_SIZE, 16);
        self.write(reg::QUEUE_DESC_LOW, base);
        self.write(reg::QUEUE_DRIVER_LOW, base + 0x400);
        self.write(reg::QUEUE_DEVICE_LOW, base + 0x800);
        self.write(reg::QUEUE_READY, 1);
    }

    fn start(&self) {
        self.write(reg::STATUS, reg::ACKNOWLEDGE | reg::DRIVER | reg::FEATURES_OK | reg::DRIVER_OK);
    }

    fn events(&self) -> Vec<&'static str> {
        self.log.lock().unwrap().events.clone()
    }
}

#[test]
fn identity_registers_are_those_of_version_2() {
    let rig = Rig::new();
    assert_eq!([0, 4, 8].map(|r| rig.read(r)), [0x7472_6976, 2, 42]);
    assert_eq!(rig.read(reg::SHM_LEN_LOW), u32::MAX);
    rig.write(reg::DEVICE_FEATURES_SEL, 1);
    assert_eq!(rig.read(reg::DEVICE_FEATURES), 1);
    rig.write(reg::QUEUE_SEL, 1);
    assert_eq!(rig.read(reg::QUEUE_SIZE_MAX), 64);
    rig.write(reg::QUEUE_SEL, 2);
    assert_eq!(rig.read(reg::QUEUE_SIZE_MAX), 0);
}

#[test]
fn device_starts_with_the_ready_queues_and_the_accepted_features() {
    let rig = Rig::new();
    rig.negotiate(1 << VIRTIO_F_VERSION_1 | 1);
    rig.queue(1, 0x1000);
    rig.start();
    assert_eq!(rig.events(), ["activate"]);
    let log = rig.log.lock().unwrap();
    assert_eq!(log.features, 1 << VIRTIO_F_VERSION_1 | 1);
    assert_eq!(log.queues, [(1, 16)]);
}

#[test]
fn features_not_offered_or_without_version_1_are_refused() {
    for features in [1 << VIRTIO_F_VERSION_1 | 2, 1] {
        let rig = Rig::new();
        rig.negotiate(features);
        assert_eq!(rig.read(reg::STATUS) & reg::FEATURES_OK, 0);
        rig.start();
        assert!(rig.events().is_empty());
    }
}

#[test]
fn queue_outside_memory_asks_for_a_reset_instead_of_starting() {
    let rig = Rig::new();
    rig.negotiate(1 << VIRTIO_F_VERSION_1);
    rig.queue(0, 0xf000_0000);
    rig.start();
    assert!(rig.events().is_empty());
    assert_eq!(rig.read(reg::STATUS) & reg::NEEDS_RESET, reg::NEEDS_RESET);
    rig.write(reg::STATUS, 0);
    assert_eq!(rig.read(reg::STATUS), 0);
}

#[test]
fn queue_cannot_be_moved_once_it_is_ready_or_the_device_runs() {
    let rig = Rig::new();
    rig.negotiate(1 << VIRTIO_F_VERSION_1);
    rig.queue(0, 0x1000);
    rig.write(reg::QUEUE_SIZE, 8);
    rig.start();
    assert_eq!(rig.log.lock().unwrap().queues, [(0, 16)]);
    rig.write(reg::QUEUE_READY, 0);
    assert_eq!(rig.read(reg::QUEUE_READY), 1);
}

#[test]
fn misaligned_queue_or_wrong_size_asks_for_a_reset_and_a_reset_makes_it_good() {
    let bad = [
        (reg::QUEUE_SIZE, 0),
        (reg::QUEUE_SIZE, 24),
        (reg::QUEUE_SIZE, 512),
        (reg::QUEUE_SIZE, 0x1_0010),
        (reg::QUEUE_DESC_LOW, 0x1008),
        (reg::QUEUE_DRIVER_LOW, 0x1001),
        (reg::QUEUE_DEVICE_LOW, 0x1002),
        (reg::QUEUE_DESC_HIGH, 1),
        (reg::QUEUE_DRIVER_HIGH, u32::MAX),
        (reg::QUEUE_DEVICE_HIGH, 1),
    ];
    let rig = Rig::new();
    for (register, value) in bad {
        rig.negotiate(1 << VIRTIO_F_VERSION_1);
        rig.queue(0, 0x1000);
        rig.write(reg::QUEUE_READY, 0);
        rig.write(register, value);
        rig.write(reg::QUEUE_READY, 1);
        rig.start();
        assert!(rig.events().is_empty(), "{register:#x} {value:#x}");
        assert_eq!(rig.read(reg::STATUS) & reg::NEEDS_RESET, reg::NEEDS_RESET, "{register:#x} {value:#x}");
        rig.write(reg::STATUS, 0);
    }
    rig.negotiate(1 << VIRTIO_F_VERSION_1);
    rig.queue(0, 0x1000);
    rig.start();
    assert_eq!(rig.events(), ["activate"]);
}

#[test]
fn driver_that_gave_up_does_not_start_the_device() {
    let rig = Rig::new();
    rig.negotiate(1 << VIRTIO_F_VERSION_1);
    rig.write(reg::STATUS, reg::ACKNOWLEDGE | reg::DRIVER | reg::FEATURES_OK | reg::FAILED);
    rig.start();
    assert!(rig.events().is_empty());
    assert_eq!(rig.read(reg::STATUS), reg::ACKNOWLEDGE | reg::DRIVER | reg::FEATURES_OK | reg::FAILED);
}

#[test]
fn device_that_cannot_start_asks_for_a_reset_and_starts_after_it() {
    let rig = Rig::new();
    rig.log.lock().unwrap().refuse = true;
    rig.negotiate(1 << VIRTIO_F_VERSION_1);
    rig.queue(0, 0x1000);
    rig.start();
    assert_eq!(rig.read(reg::STATUS) & reg::NEEDS_RESET, reg::NEEDS_RESET);
    assert_eq!(rig.read(reg::INTERRUPT_STATUS), reg::INTERRUPT_CONFIG);
    rig.log.lock().unwrap().refuse = false;
    rig.write(reg::STATUS, 0);
    assert_eq!((rig.read(reg::STATUS), rig.read(reg::INTERRUPT_STATUS)), (0, 0));
    rig.negotiate(1 << VIRTIO_F_VERSION_1);
    rig.queue(0, 0x1000);
    rig.start();
    assert_eq!(rig.events(), ["activate"]);
}

#[test]
fn interrupt_handler_and_notifications_do_not_wait_for_a_device_that_is_slow_to_stop() {
    let rig = Rig::new();
    rig.negotiate(1 << VIRTIO_F_VERSION_1);
    rig.queue(0, 0x1000);
    rig.start();
    let interrupt = rig.log.lock().unwrap().interrupt.clone().unwrap();
    std::thread::scope(|scope| {
        // The device stops only when its log can be written, that is, at the end of this scope.
        let log = rig.log.lock().unwrap();
        let stopping = scope.spawn(|| rig.write(reg::STATUS, 0));
        while rig.transport.state.try_lock().is_ok() {
            std::thread::yield_now();
        }
        interrupt.queue_used(0);
        assert_eq!(rig.read(reg::INTERRUPT_STATUS), reg::INTERRUPT_USED);
        rig.write(reg::INTERRUPT_ACK, reg::INTERRUPT_USED);
        assert_eq!(rig.read(reg::INTERRUPT_STATUS), 0);
        rig.write(reg::QUEUE_NOTIFY, 0);
        assert!(!stopping.is_finished());
        drop(log);
    });
    assert_eq!(rig.events(), ["activate", "reset"]);
}

#[test]
fn interrupts_show_their_cause_until_acknowledged() {
    let rig = Rig::new();
    rig.negotiate(1 << VIRTIO_F_VERSION_1);
    rig.queue(0, 0x1000);
    rig.start();
    let interrupt = rig.log.lock().unwrap().interrupt.clone().unwrap();
    interrupt.queue_used(0);
    let generation = rig.read(reg::CONFIG_GENERATION);
    interrupt.config_changed();
    assert_eq!(rig.line.read().unwrap(), 2);
    assert_ne!(rig.read(reg::CONFIG_GENERATION), generation);
    assert_eq!(rig.read(reg::INTERRUPT_STATUS), 3);
    rig.write(reg::INTERRUPT_ACK, 1);
    assert_eq!(rig.read(reg::INTERRUPT_STATUS), 2);
}

#[test]
fn notification_signals_the_event_of_its_queue_only() {
    let rig = Rig::new();
    rig.write(reg::QUEUE_NOTIFY, 1);
    rig.write(reg::QUEUE_NOTIFY, 7);
    assert!(rig.transport.kicks()[0].read().is_err());
    assert_eq!(rig.transport.kicks()[1].read().unwrap(), 1);
}

#[test]
fn device_started_during_a_pause_is_held_until_the_resume() {
    let rig = Rig::new();
    rig.transport.pause();
    rig.negotiate(1 << VIRTIO_F_VERSION_1);
    rig.queue(0, 0x1000);
    rig.start();
    rig.transport.resume();
    rig.transport.resume();
    rig.write(reg::STATUS, 0);
    rig.write(reg::STATUS, 0);
    assert_eq!(rig.events(), ["activate", "pause", "resume", "reset"]);
}

#[test]
fn configuration_space_is_read_in_any_width() {
    let rig = Rig::new();
    let mut data = [0; 8];
    rig.transport.read(reg::CONFIG + 3, &mut data);
    assert_eq!(data, [3; 8]);
}

proptest! {
    #[test]
    fn any_sequence_of_accesses_leaves_a_device_that_a_reset_makes_usable(
        accesses in prop::collection::vec(
            (any::<bool>(), prop_oneof![0_u64..0x120, (0_u64..0x48).prop_map(|r| r * 4)],
             prop_oneof![Just(4_usize), 1_usize..9], prop_oneof![any::<u32>(), 0_u32..16]), 0..300)
    ) {
        let rig = Rig::new();
        for (write, offset, width, value) in accesses {
            let mut data = [0; 8];
            data[..4].copy_from_slice(&value.to_le_bytes());
            let data = &mut data[..width];
            if write { rig.transport.write(offset, data) } else { rig.transport.read(offset, data) }
        }
        rig.write(reg::STATUS, 0);
        prop_assert_eq!(rig.read(reg::STATUS), 0);
        rig.log.lock().unwrap().events.clear();
        rig.negotiate(OFFERED);
        rig.queue(0, 0x1000);
        rig.start();
        prop_assert_eq!(rig.events(), ["activate"]);
    }

    /// Status and features against a model made after sections 2.1.1, 2.2 and 3.1.1.
    #[test]
    fn status_follows_the_rules_of_initialization(
        begun in 0_usize..5,
        writes in prop::collection::vec(
            (prop_oneof![4 => Just(reg::STATUS), 1 => Just(reg::DRIVER_FEATURES_SEL),
                         2 => Just(reg::DRIVER_FEATURES), 2 => Just(reg::QUEUE_READY)],
             prop_oneof![Just(0_u32), Just(1), Just(3), Just(11), Just(15), Just(0x8f), Just(1 << 29), any::<u32>()]),
            0..60)
    ) {
        let rig = Rig::new();
        let (mut status, mut features, mut select, mut started) = (0, [0_u32; 2], 0, 0);
        // Chance alone seldom gets past the features.
        let begin = [(reg::STATUS, 1), (reg::STATUS, 3), (reg::DRIVER_FEATURES_SEL, 1), (reg::DRIVER_FEATURES, 1)];
        for (register, value) in begin.into_iter().take(begun).chain(writes) {
            rig.write(register, value);
            match register {
                reg::STATUS if value == 0 => (status, features, select) = (0, [0; 2], 0),
                reg::STATUS => {
                    status |= value & (reg::ACKNOWLEDGE | reg::DRIVER | reg::FAILED);
                    let agreed = features[1] == 1 && features[0] & !(1 << 29 | 1) == 0;
                    if value & reg::FEATURES_OK != 0 && status & 3 == 3 && agreed {
                        status |= reg::FEATURES_OK;
                    }
                    let may_start = status & (reg::FEATURES_OK | reg::FAILED | reg::DRIVER_OK) == reg::FEATURES_OK;
                    if value & reg::DRIVER_OK != 0 && may_start {
                        status |= reg::DRIVER_OK;
                        started += 1;
                    }
                }
                reg::DRIVER_FEATURES_SEL => select = value,
                reg::DRIVER_FEATURES if status & (reg::DRIVER | reg::FEATURES_OK) == reg::DRIVER => {
                    if let Some(word) = features.get_mut(select as usize) {
                        *word = value;
                    }
                }
                _ => {}
            }
            prop_assert_eq!(rig.read(reg::STATUS) & !reg::NEEDS_RESET, status);
        }
        let log = rig.log.lock().unwrap();
        let activations = log.events.iter().filter(|e| **e == "activate").count();
        // A queue made ready at address 0 is a queue in memory, so that every start succeeds.
        prop_assert_eq!(activations, started);
    }
}
