//! Control API of vmm: types, a small HTTP server and client over a Unix socket.
