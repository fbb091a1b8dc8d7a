"""Models into files and out of them."""
