"""The engine: requests as token ids, batched into forwards, over kept prefixes."""
