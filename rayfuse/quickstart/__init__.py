"""The quickstart: a small world of experts made on the spot, and one run that fuses them."""
