"""Base models: their shapes, their weights, and one file an architecture."""
