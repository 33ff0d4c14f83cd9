"""Checks of the documentation: its sources in the ordinary tests, its built pages in a browser."""
