"""Shards to documents to tokens to rows: a deterministic stream, resumed exactly on any replicas.  No torch."""
