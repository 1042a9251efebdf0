"""Generations as the event loop sees them: jobs, streams, server-sent events, metrics."""
