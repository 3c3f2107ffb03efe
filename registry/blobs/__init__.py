"""Immutable bytes under their sha256, a namespace a tenant."""
