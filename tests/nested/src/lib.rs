//! Stock Linux guests on real KVM inside an emulated host.
