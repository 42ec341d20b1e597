"""`python -m ebjdat`: the same as the command `ebjdat`."""

from ebjdat.cli import app

app()
