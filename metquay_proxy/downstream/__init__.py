"""The side of the tools: their connections, the handler of each request, the pages below ``/-/``."""
