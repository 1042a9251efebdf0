"""What every HTTP request meets: errors, checks, the protocol's limits, the page."""
