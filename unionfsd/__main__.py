"""`python -m unionfsd`."""

from unionfsd.start import program

program()
