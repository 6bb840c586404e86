"""`python -m attnreg` is the command `attnreg`."""

from attnreg.cli import main

main()
