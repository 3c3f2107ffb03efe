"""Adapters, their immutable versions, the forms of a version, and aliases."""
