"""Tools of MCP servers (modelcontextprotocol.io), through the official `mcp` package (the extra `mcp`)."""

__all__: list[str] = []
