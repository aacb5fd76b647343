"""Plotly figures, each a plain function from a record."""
