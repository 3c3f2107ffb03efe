"""Telling a tenant's own systems what happened: endpoints, an outbox of events, signed deliveries at least once."""
