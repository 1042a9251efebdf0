"""OpenAI's APIs: chat completions, responses, completions and models."""
