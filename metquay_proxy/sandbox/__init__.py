"""The simulator of Metquay: imports nothing of ours."""
