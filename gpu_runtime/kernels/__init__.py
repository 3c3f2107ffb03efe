"""The arithmetic of a step: one protocol, a plain-torch reference that specifies it, and a fast CPU backend."""
