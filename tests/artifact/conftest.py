"""Hypothesis without wall-clock deadlines: the machine that runs this is shared."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("artifact", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("artifact")
