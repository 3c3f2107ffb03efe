"""Large blobs on their way in by parts: begun, resumed, finalised, aborted."""
