"""Models, and the named configurations of them."""
