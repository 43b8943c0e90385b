"""One request and its answer: token, quota, sending, and what may be sent again. No sockets, no HTTP library."""
