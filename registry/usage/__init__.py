"""What was used: replicas' reports, settled once, summed up by day."""
