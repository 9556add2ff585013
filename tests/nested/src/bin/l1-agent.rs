//! Runs commands in the emulated host for the machine that emulates it (`vmm_nested::protocol`).
//!
//! Its one argument is the device to talk through. It ends when the other side closes that.

use std::collections::HashMap;
use std::error::Error;
use std::fs::{File, OpenOptions};
use std::process::{Command, ExitCode};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vmm_nested::job::{Event, Job};
use vmm_nested::protocol::{BODY_MAX, Frame, Kind, Start};

fn main() -> ExitCode {
    let Some(device) = std::env::args_os().nth(1) else {
        eprintln!("l1-agent: which device? l1-agent /dev/vport0p1");
        return ExitCode::from(2);
    };
    match OpenOptions::new().read(true).write(true).open(&device).map_err(Into::into).and_then(serve) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("l1-agent: {}: {error}", device.display());
            ExitCode::FAILURE
        }
    }
}

/// A machine that never runs, for as long as the agent does. KVM changes the kernel's own code when the first machine of
/// a host comes and when the last one goes, and QEMU's emulation at times goes on with the code of before: the emulated
/// host then stands still.
fn first_machine() -> Result<(VmFd, VcpuFd), kvm_ioctls::Error> {
    let machine = Kvm::new()?.create_vm()?;
    machine.create_irq_chip()?;
    let processor = machine.create_vcpu(0)?;
    Ok((machine, processor))
}

fn serve(mut port: File) -> Result<(), Box<dyn Error>> {
    let _machine = first_machine().inspect_err(|error| eprintln!("l1-agent: KVM: {error}"));
    let answers = Arc::new(Mutex::new(port.try_clone()?));
    let mut jobs = HashMap::new();
    send(&answers, &Frame::new(0, Kind::Ready, ""));
    while let Some(frame) = Frame::read(&mut port)? {
        let Frame { channel, kind, body } = frame;
        match kind {
            Kind::Start => match start(channel, &body, Arc::clone(&answers)) {
                Ok(job) => drop(jobs.insert(channel, job)),
                Err(error) => send(&answers, &Frame::new(channel, Kind::Refused, error.to_string())),
            },
            // What is sent to a command that has ended meanwhile is lost, as on any terminal.
            Kind::Input => {
                if let Some(job) = jobs.get(&channel) {
                    job.input(body);
                }
            }
            Kind::EndOfInput => {
                if let Some(job) = jobs.get_mut(&channel) {
                    job.end_input();
                }
            }
            Kind::Signal => {
                let signal = String::from_utf8_lossy(&body).parse();
                if let (Some(job), Ok(signal)) = (jobs.get(&channel), signal) {
                    job.signal(signal);
                }
            }
            Kind::Ready | Kind::Output | Kind::Errors | Kind::Exit | Kind::Refused => {
                return Err(format!("{kind:?} from the wrong side").into());
            }
        }
    }
    Ok(())
}

fn start(channel: u32, body: &[u8], answers: Arc<Mutex<File>>) -> Result<Job, Box<dyn Error>> {
    let Start { command, terminal } = serde_json::from_slice(body)?;
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", &command]);
    let report = move |event| {
        let (kind, body) = match event {
            Event::Output(bytes) => (Kind::Output, bytes),
            Event::Errors(bytes) => (Kind::Errors, bytes),
            // A status is a word and a number.
            Event::Exit(status) => (Kind::Exit, serde_json::to_vec(&status).unwrap_or_default()),
            Event::Refused(why) => (Kind::Refused, why.into_bytes()),
        };
        debug_assert!(body.len() <= BODY_MAX);
        send(&answers, &Frame::new(channel, kind, body));
    };
    Ok(Job::start(shell, terminal, report)?)
}

/// Sends `frame`. Should that fail then reading fails too, and ends the agent.
fn send(answers: &Mutex<File>, frame: &Frame) {
    let mut answers = answers.lock().unwrap_or_else(PoisonError::into_inner);
    if let Err(error) = frame.write(&mut *answers) {
        eprintln!("l1-agent: {error}");
    }
}
