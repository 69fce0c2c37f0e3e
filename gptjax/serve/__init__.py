"""A server of runs: OpenAI's completions over HTTP, decoded together, and a local page."""
