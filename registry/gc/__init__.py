"""Garbage collection: what was deleted long enough ago is purged, what nobody needs leaves the store."""
