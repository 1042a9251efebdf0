"""The demo model's factory: its world, its training, and its export. Not installed with the package."""
