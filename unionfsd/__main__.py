"""`python -m unionfsd`."""

from unionfsd.cli import program

program()
