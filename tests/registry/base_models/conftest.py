"""The fixtures of the adapters' tests, without a base model registered before."""

from tests.registry.adapters.conftest import operator, work, worker

__all__ = ["operator", "work", "worker"]
