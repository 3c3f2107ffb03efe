"""Adapters on their way to the kernels: source, disk and host tiers, page images, residency in the pool."""
