"""Replicas, grants, and the front door to inference."""
