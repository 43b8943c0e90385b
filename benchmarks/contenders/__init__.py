"""What the contenders run: configurations with @NAMES@ to be filled in, and scripts."""
