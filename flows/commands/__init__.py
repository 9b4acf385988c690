"""The commands of `gptcore`, a file for each kind; `flows/cli.py` puts them together."""
