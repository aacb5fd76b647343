"""Records as one self-contained HTML page: jinja2 templates, plotly figures, no request to anywhere."""
