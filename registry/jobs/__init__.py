"""Durable rows of asynchronous work, claimed by lease and fence."""
