"""Everything that takes longer than a request: validation of pushed versions, import of base models."""
