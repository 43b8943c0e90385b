"""A local authenticating reverse proxy for the Metquay API."""

__version__ = "0.1.0"
