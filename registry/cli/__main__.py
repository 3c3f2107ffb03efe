"""`python -m registry.cli`: the `lorary` command where it is not installed."""

from registry.cli.main import main

main()
