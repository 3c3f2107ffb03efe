"""Who runs in the next step: queues, admission, continuous batching. No model, no clock, no threads."""
