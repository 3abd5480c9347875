"""Whether what would be published installs and works in an empty environment: python -m tests.install --help."""
