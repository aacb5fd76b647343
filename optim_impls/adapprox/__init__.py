"""Adapprox: the second moment of a matrix as a product of two thin factors."""
