"""fastunet."""
