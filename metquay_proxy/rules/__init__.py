"""Every decision, as pure functions of values and a time: nothing here waits, logs, or looks at a clock or a socket."""
