"""The tests. Whatever imports them has minivit's lines marked from here on, under ``pytest --cov``."""

from tests import cover

cover.begin()
