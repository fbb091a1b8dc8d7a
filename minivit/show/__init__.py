"""Pictures, curves, pages and tables: arrays in, PNG, SVG, HTML and text out. No model is known here."""
