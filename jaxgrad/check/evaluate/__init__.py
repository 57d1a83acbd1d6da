"""Both gradients at a point: what is given, which points are tried, what they give there, and whether they agree."""
