"""The order of things: each flow on one screen, and the `gptcore` command."""
