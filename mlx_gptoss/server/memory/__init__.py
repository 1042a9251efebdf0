"""What a server remembers: sampled turns and stored responses."""
