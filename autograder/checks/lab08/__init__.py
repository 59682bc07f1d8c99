"""Checks of Lab 8, encoder propagation: one module for each part."""
