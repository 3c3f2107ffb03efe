"""The engine: schedule, run, emit; its builder and the thread that steps it."""
