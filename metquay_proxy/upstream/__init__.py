"""The side of Metquay: connections, their pool, TLS, the corporate proxy, the login."""
