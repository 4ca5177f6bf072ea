"""What the relay says of itself: counters, metrics, health checks and logs."""
