"""What a tenant may use: limits, what is counted against them, and the minutes of inference."""
