"""`python -m kvjax`: the same as the command `kvjax`."""

from kvjax.cli import main

main()
