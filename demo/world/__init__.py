"""The narrow world that the demo model is trained on: generators of harmony conversations with answers."""
