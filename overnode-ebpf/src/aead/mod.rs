//! ChaCha20-Poly1305 (RFC 8439), in steps that fit a `bpf_loop`.
