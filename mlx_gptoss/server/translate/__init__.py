"""From a request's fields to a harmony conversation and to how it is sampled."""
